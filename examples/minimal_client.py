"""A client in 60 lines, with nothing of this project: what docs/protocol-for-implementers.md tells how to write.

    python examples/minimal_client.py "Tell me about cats."

The argument is the prompt. The Python that runs this runs the service too.
"""

import struct
import subprocess
import sys

import msgpack

CREDIT = 4


class Client:
    def __init__(self, command):
        self.service = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.last, self.parts = 0, {}
        assert self.receive()[0] == "ready"  # always the first frame

    def send(self, *message):
        payload = msgpack.packb(message)
        self.service.stdin.write(struct.pack(">I", len(payload)) + payload)
        self.service.stdin.flush()

    def receive(self):
        (size,) = struct.unpack(">I", self.service.stdout.read(4))
        message = msgpack.unpackb(self.service.stdout.read(size))
        if message[0] == "part":  # a slice of a large message; others may stand between
            _, number, last, piece = message
            self.parts.setdefault(number, []).append(piece)
            return msgpack.unpackb(b"".join(self.parts.pop(number))) if last else self.receive()
        return self.receive() if message[0] == "log" else message

    def request(self, kind, *fields):
        """Sends a request; returns the result, or raises. Only for when nothing else is under way."""
        self.last += 1
        self.send(kind, self.last, *fields)
        status, _, result = self.receive()
        assert status == "ok", result
        return result

    def demand(self, session, node):
        """Yields the chunks, then the outputs. Each chunk that was taken is paid back by credit."""
        self.last += 1
        self.send("demand", self.last, session, node, {"credit": CREDIT})
        while (message := self.receive())[0] == "node_stream":
            yield message[2]
            self.send("credit", self.last, 1)
        kind, _, outcome, demand, _meta = message
        assert (kind, demand) == ("demand_complete", self.last), outcome
        yield outcome


client = Client([sys.executable, "-m", "demandport", "serve"])
client.request("hello", {"protocol": [1, 1], "client": "minimal"})
nodes = [{"id": "llm", "node_type": "llamacpp-inference", "data": {"model_path": "tiny", "prompt": sys.argv[1]}}]
client.request("open", "s", {"nodes": nodes, "edges": []})
*chunks, outputs = client.demand("s", "llm")
print(outputs["response"])
print("the chunks are the text:", "".join(chunks) == outputs["response"])
text = "ü" * 200_000  # larger than a part, both ways
client.request("edit", "s", [{"op": "add_node", "node": {"id": "in", "node_type": "text-input"}}])
client.request("edit", "s", [{"op": "set_input", "node": "in", "port": "text", "value": text}])
print("a large value came back:", list(client.demand("s", "in")) == [{"text": text}])
client.service.stdin.close()  # the end of its input ends the service
print("the service ended with status", client.service.wait())
