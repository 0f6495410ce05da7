"""One network on two machines: a device sends coded feature maps over a socket, a server answers with the network's outputs.

    python examples/split_over_socket.py [--at features.5] [--bits-per-value 1.0] [--images 200]

Both are processes of this machine here, and share nothing but the codec file and the socket. Each message is a number of packets
(uint32), and for each its length (uint32) and bytes; each answer is float32 outputs. All numbers are little-endian.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import struct
import tempfile
from pathlib import Path

import numpy as np
import torch

import transquant as tq
from transquant.demo.network import load_digits_split, pretrained

CLASSES, BATCH = 10, 50


def serve(codec: Path, at: str, port: multiprocessing.Queue[int]) -> None:
    """The server's process: has the second half of the network, answers until the connection ends."""
    _, server = tq.features.load(codec).split(pretrained(), at)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port.put(listening.getsockname()[1])
        connection, _ = listening.accept()
        with connection:
            while head := receive(connection, 4, may_end=True):
                packets = [receive(connection, *number(receive(connection, 4))) for _ in range(*number(head))]
                connection.sendall(server.decode(packets).numpy().astype("<f4").tobytes())


def number(data: bytes) -> tuple[int]:
    """A length as it is sent."""
    return struct.unpack("<I", data)


def receive(connection: socket.socket, size: int, may_end: bool = False) -> bytes:
    """Exactly so many bytes; none where the other side has ended and may."""
    data = bytearray()
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            if may_end and not data:
                return b""
            raise ConnectionError(f"the connection ended {size - len(data)} bytes too early")
        data += piece
    return bytes(data)


def main() -> None:
    """The device's process: has the first half, sends packets, compares what comes back with the whole network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", default="features.5")
    parser.add_argument("--bits-per-value", type=float, default=1.0)
    parser.add_argument("--images", type=int, default=200)
    options = parser.parse_args()
    (samples, _), (images, labels) = load_digits_split()
    images, labels, network = images[: options.images], labels[: options.images], pretrained()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "digits.codec"
        tq.features.calibrate(network, samples[:512], bits_per_value=options.bits_per_value).save(path)
        context = multiprocessing.get_context("spawn")
        port: multiprocessing.Queue[int] = context.Queue()
        process = context.Process(target=serve, args=(path, options.at, port))
        process.start()
        device, _ = tq.features.load(path).split(network, options.at)

        sent, maps, answers = 0, 0, []
        with socket.create_connection(("127.0.0.1", port.get(timeout=120))) as connection:
            for batch in images.split(BATCH):
                packets = device.encode(batch)
                message = struct.pack("<I", len(packets)) + b"".join(struct.pack("<I", len(p)) + p for p in packets)
                connection.sendall(message)
                answer = receive(connection, 4 * CLASSES * len(batch))
                answers.append(torch.from_numpy(np.frombuffer(answer, "<f4").reshape(-1, CLASSES).copy()))
                sent += len(message)
                maps += device.coded.point.channels * len(batch)
        process.join()

    with torch.no_grad():
        whole = network(images)
        pixels = device.network(images[:1])[0, 0].numel()
    outputs = torch.cat(answers)
    print(f"sent             {sent} bytes for {len(images)} images")
    print(f"8 bits a value   {maps * pixels} bytes")
    print(f"split network    {100 * (outputs.argmax(1) == labels).float().mean():.2f} % right")
    print(f"whole network    {100 * (whole.argmax(1) == labels).float().mean():.2f} % right")


if __name__ == "__main__":
    main()
