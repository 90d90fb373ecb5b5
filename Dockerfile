# `make image` (CPU) and `make image-cuda` (NVIDIA GPUs); docs/install.md says how to run them.
ARG BASE=python:3.12-slim

FROM ${BASE} AS wheel
WORKDIR /source
COPY . .
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${BASE} AS cpu
# TORCH: another build of PyTorch, by version or address. PIP_EXTRA_INDEX_URL: where pip looks beside its usual place,
# for PyTorch's builds without CUDA, which are a tenth as large.
ARG TORCH=torch
ARG EXTRAS=demo,plot,serve,train
ARG PIP_EXTRA_INDEX_URL=
COPY --from=wheel /wheels /wheels
COPY requirements.lock /wheels/
RUN python3 -m pip install --no-cache-dir "${TORCH}" \
    && python3 -m pip install --no-cache-dir --constraint /wheels/requirements.lock "$(ls /wheels/*.whl)[${EXTRAS}]" \
    && rm -r /wheels
RUN useradd --create-home user && mkdir /videos && chown user /videos
USER user
WORKDIR /videos
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["video-ma2mba"]
CMD ["demo"]

# Triton compiles launchers for its kernels with a C compiler; CUDA itself comes with PyTorch's usual build.
FROM cpu AS cuda
USER root
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
USER user
