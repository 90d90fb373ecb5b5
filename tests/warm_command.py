"""`video-ma2mba` from a process that has imported what commands import: tests of many commands pay for that once.

`warm_command.py SERVE SOCKET` imports, and forks a process for each command. `warm_command.py RUN SOCKET WORDS...` is
the command: a client that hands over its streams, folder, environment and signals, and ends with the exit code.
"""

import json
import os
import select
import signal
import socket
import sys

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def run(address: str, words: list[str]) -> int:
    """Exit code of a command, as a shell would tell it."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        told = json.dumps({"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
        socket.send_fds(server, [len(told).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(told)
        for number in PASSED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, frame: server.send(bytes([number])))
        code = int(server.recv(8) or b"1")
    if code >= 0:
        return code
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
    return 128 - code


def serve(address: str) -> dict | None:
    """Takes commands until killed. Returns in the process of each command, with what the client told."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who look after commands
    while True:
        client, _ = listener.accept()
        if os.fork():
            client.close()
            continue
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        listener.close()
        size, streams, *_ = socket.recv_fds(client, 8, 3)
        told = json.loads(client.recv(int.from_bytes(size, "big"), socket.MSG_WAITALL))
        command = os.fork()
        if command == 0:
            client.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
                os.close(stream)
            return told
        for stream in streams:
            os.close(stream)
        ended = os.pidfd_open(command)
        while ended not in select.select([ended, client], [], [])[0]:
            number = client.recv(1)
            os.kill(command, number[0] if number else signal.SIGKILL)
            if not number:
                os._exit(1)
        client.sendall(str(os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])).encode())
        os._exit(0)


def imports() -> None:
    """What takes seconds; nothing here may start a thread, which a fork would lose."""
    import contextlib
    import gc
    import importlib

    gc.disable()
    for name in ("av", "cli.main", "loading", "modeling_video_ma2mba.pipeline_video_ma2mba", "trainer.video_trainer"):
        with contextlib.suppress(ImportError):  # an extra
            importlib.import_module(name if name == "av" else f"video_ma2mba.{name}")
    gc.enable()
    gc.freeze()


if __name__ == "__main__":
    if sys.argv[1] == "RUN":
        raise SystemExit(run(sys.argv[2], sys.argv[3:]))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command's entry point says
    del sys.path[0]  # the folder of this file, whose names are none of the command's
    imports()
    told = serve(sys.argv[2])
    os.chdir(told["folder"])
    os.environ.clear()
    os.environ.update(told["environment"])
    sys.argv = ["video-ma2mba", *told["words"]]
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):  # those were the server's
        setattr(
            sys, name, os.fdopen(number, mode, buffering=1 if number == 2 else -1, encoding="utf-8", closefd=False)
        )
    from video_ma2mba.cli.main import main

    raise SystemExit(main())
