"""Canonical rows of data sets of `datasets`, held in files, in memory or streaming, and the merging of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, IterableDataset

from .canonical import MEDIA_COLUMNS, canonical_row, features, merge_neighbours, merge_rows, without_group
from .row_formats import Row, detect_format

_ARRAYS = (datasets.Array3D, datasets.Array4D, datasets.Array5D)
_STREAMED_TOGETHER = 1000  # rows of a stream among which those of one video are looked for


def merge_groups(rows: Dataset) -> Dataset:
    """Rows of one group as one sample, in the order in which the groups first appear."""
    groups: dict[str, list[int]] = {}
    order: list[list[int]] = []
    for place, group in enumerate(rows["group"]):
        if group is None:
            order.append([place])
        elif group in groups:
            groups[group].append(place)
        else:
            groups[group] = [place]
            order.append(groups[group])
    if all(len(places) == 1 for places in order):
        return rows.remove_columns(["group", "start"])
    arguments = {"rows": rows, "order": tuple(map(tuple, order))}
    return Dataset.from_generator(_groups, features=features(), gen_kwargs=arguments)


def _groups(rows: Dataset, order: tuple[tuple[int, ...], ...]) -> Iterator[Row]:
    for places in order:
        yield merge_rows([rows[place] for place in places])


def from_dataset(
    rows: Dataset | IterableDataset, base: str | None, merge: bool, name: str
) -> Dataset | IterableDataset:
    """Canonical rows of a data set of `datasets`; what it holds of videos and images is neither decoded nor copied."""
    columns = rows.column_names or list(next(iter(rows), {}))
    if set(columns) >= {"messages", "id", "problem"}:
        return rows  # canonical already
    form = detect_format(columns, name)
    types = rows.features or {}
    if not types:  # rows that stream from a generator: the first one tells
        first = next(iter(rows))
        held = tuple(column for column in MEDIA_COLUMNS if not _is_path(first.get(column)))
    rows = undecoded(rows)
    if types:
        held = tuple(column for column in MEDIA_COLUMNS if column in types and _holds_data(types[column]))
    if isinstance(rows, IterableDataset):
        return _streamed(rows, columns, held, base, merge, name)
    texts = rows.select_columns([column for column in columns if column not in held])
    lengths = {column: _list_lengths(rows, column) for column in held if column.endswith("s")}

    def convert(row: Row, number: int) -> Row:
        places = {column: [None] * lengths[column][number] if column in lengths else True for column in held}
        return _converted({**row, **places}, number, base, merge, name, held)

    texts = texts.map(
        convert, with_indices=True, remove_columns=texts.column_names, features=features(grouped=True), desc=form.name
    )
    if not held:
        return merge_groups(texts)
    found = datasets.concatenate_datasets(
        [texts.remove_columns(["group", "start"]), rows.select_columns(list(held))], axis=1
    )
    arrays = [column for column in held if isinstance(types[column], _ARRAYS)]
    if not arrays:
        return found
    return found.with_format("numpy", columns=arrays, output_all_columns=True, dtype=np.dtype(types[arrays[0]].dtype))


def _streamed(
    rows: IterableDataset, columns: list[str], held: tuple[str, ...], base: str | None, merge: bool, name: str
) -> IterableDataset:
    """Canonical rows of a data set that streams, merged within batches of rows where it holds no videos itself."""
    types = None
    if rows.features or not held:
        types = datasets.Features(features() | {column: rows.features[column] for column in held})
    options = {
        "with_indices": True,
        "remove_columns": [column for column in columns if column not in (*held, "messages", "id", "problem")],
        "features": types,
    }
    known = {"base": base, "merge": merge, "name": name, "held": held}  # of functions that workers can be sent
    if held:
        return rows.map(partial(_convert_row, **known), **options)
    return rows.map(partial(_convert_batch, **known), batched=True, batch_size=_STREAMED_TOGETHER, **options)


def _convert_row(row: Row, number: int, **known: Any) -> Row:
    return without_group(_converted(row, number, **known))


def _convert_batch(batch: dict[str, list[Any]], numbers: list[int], **known: Any) -> dict[str, list[Any]]:
    given = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    found = list(merge_neighbours(_converted(row, n, **known) for row, n in zip(given, numbers, strict=True)))
    return {column: [row[column] for row in found] for column in ("messages", "id", "problem")}


def _converted(row: Row, number: int, base: str | None, merge: bool, name: str, held: tuple[str, ...]) -> Row:
    return canonical_row(row, f"{name}[{number}]", base, merge, held)


def _list_lengths(rows: Dataset, column: str) -> list[int]:
    """How many entries the lists of a column have, without reading them."""
    import pyarrow.compute as pc

    lists = rows.select_columns([column]).with_format("arrow")
    return [found or 0 for batch in lists.iter(1000) for found in pc.list_value_length(batch[column]).to_pylist()]


def undecoded(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The same rows, videos and images in their columns left as path and bytes."""
    types = rows.features or {}
    for column in MEDIA_COLUMNS:
        if column in types and (kind := _undecoded(types[column])) is not None:
            rows = rows.cast_column(column, kind)
    return rows


def _undecoded(kind: Any) -> Any:
    """The type that leaves a column of videos or images as path and bytes; None for other columns."""
    if isinstance(kind, datasets.Image):
        return datasets.Image(decode=False)
    if hasattr(datasets, "Video") and isinstance(kind, datasets.Video):
        return datasets.Video(decode=False)
    if isinstance(kind, datasets.List) and (inner := _undecoded(kind.feature)) is not None:
        return datasets.List(inner)
    return None


def _is_path(value: Any) -> bool:
    return value is None or isinstance(value, str) or (isinstance(value, list) and all(map(_is_path, value)))


def _holds_data(kind: Any) -> bool:
    """Whether a column holds more than paths."""
    inner = kind.feature if isinstance(kind, datasets.List) else kind
    return not (isinstance(inner, datasets.Value) and inner.dtype in ("string", "large_string", "null"))
