"""Delays the packets to and from a TCP port of other machines, in this network namespace.

    nsenter --net --target PID .venv/bin/python -m tests.faults.delay PORT ROUND_TRIP_SECONDS

The kernel queues the packets for this process (NFQUEUE), which lets each one pass when it is due.
`tc qdisc add ... netem delay` would do the same, but many kernels are built without it. Prints a
line when it is ready. On SIGTERM the packets pass without a delay again.
"""

import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque

_QUEUE = 0
# From linux/netfilter/nfnetlink.h and nfnetlink_queue.h.
_NETLINK_NETFILTER = 12
_SUBSYSTEM = 3 << 8
_PACKET, _VERDICT, _CONFIG = _SUBSYSTEM, _SUBSYSTEM | 1, _SUBSYSTEM | 2
_CONFIG_COMMAND, _CONFIG_PARAMETERS, _CONFIG_MAX_LENGTH = 1, 2, 3
_BIND, _COPY_META = 1, 1
_PACKET_HEADER, _VERDICT_HEADER = 1, 2
_ACCEPT = 1
_REQUEST = 1  # A flag of netlink.


def _message(kind: int, attribute: int, value: bytes) -> bytes:
    """Return a netlink message about the queue, with one attribute."""
    value = struct.pack("=HH", 4 + len(value), attribute) + value
    value += bytes(-len(value) % 4)
    queue = struct.pack(">BBH", socket.AF_UNSPEC, 0, _QUEUE)
    header = struct.pack("=IHHII", 16 + len(queue) + len(value), kind, _REQUEST, 0, 0)
    return header + queue + value


def _packet_ids(data: bytes) -> list[bytes]:
    """Return the ids of the packets in netlink messages."""
    ids = []
    while data:
        length, kind = struct.unpack_from("=IH", data)
        attributes, data = data[20:length], data[-(-length // 4) * 4 :]
        while kind == _PACKET and attributes:
            size, attribute = struct.unpack_from("=HH", attributes)
            if attribute == _PACKET_HEADER:
                ids.append(attributes[4:8])
            attributes = attributes[-(-size // 4) * 4 :]
    return ids


def delay_packets(seconds: float) -> None:
    """Delay each packet of the queue."""
    queue = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    queue.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    command = struct.pack(">BxH", _BIND, 0)
    queue.send(_message(_CONFIG, _CONFIG_COMMAND, command))
    queue.send(_message(_CONFIG, _CONFIG_PARAMETERS, struct.pack(">IB", 0, _COPY_META)))
    queue.send(_message(_CONFIG, _CONFIG_MAX_LENGTH, struct.pack(">I", 100_000)))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    due: deque[tuple[float, bytes]] = deque()
    while True:
        wait = max(0.0001, due[0][0] - time.monotonic()) if due else None
        queue.settimeout(wait)
        try:
            for packet in _packet_ids(queue.recv(65536)):
                due.append((time.monotonic() + seconds, packet))
        except TimeoutError:
            pass
        while due and due[0][0] <= time.monotonic():
            verdict = struct.pack(">I", _ACCEPT) + due.popleft()[1]
            queue.send(_message(_VERDICT, _VERDICT_HEADER, verdict))


def main(port: str, round_trip: str) -> None:
    """Delay each direction by half of the round trip, until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    rules = (("INPUT", "--sport"), ("OUTPUT", "--dport"))
    target = ("-j", "NFQUEUE", "--queue-num", str(_QUEUE), "--queue-bypass")
    rule = [(chain, "-p", "tcp", end, port, *target) for chain, end in rules]
    for each in rule:
        subprocess.run(["iptables", "-w", "-A", *each], check=True)
    try:
        delay_packets(float(round_trip) / 2)
    finally:
        for each in rule:
            subprocess.run(["iptables", "-w", "-D", *each], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
