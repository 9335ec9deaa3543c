"""A native runtime in miniature, as docs/command-engine.md describes one: a program of its own, which knows nothing of petals-win.

Its model is real, if small: which word follows which in a text, given as its one argument. A token is a word with the blank
before it. Words of a prompt make it behave badly: crash, hang, flood, half, deaf, long, many, stranger, mute, grow.
"""

import json
import os
import random
import sys
import threading
import time
import zlib
from collections import defaultdict

CONTEXT = 512
PACE_S = 0.0005
written = threading.Lock()


def send(**message):
    with written:
        sys.stdout.buffer.write(json.dumps(message).encode() + b"\n")
        sys.stdout.buffer.flush()


class Model:
    def __init__(self, path):
        with open(path, encoding="utf-8") as file:
            self.words = file.read().split()
        self.next = defaultdict(list)
        for one, other in zip(self.words, self.words[1:] + self.words[:1], strict=True):
            self.next[one].append(other)

    def first(self, prompt):
        return self.words[zlib.crc32(prompt.encode()) % len(self.words)]

    def after(self, word, temperature, drawn):
        return drawn.choice(self.next[word]) if temperature else self.next[word][0]


def answer(model, asked, cancelled):
    id, options = asked["id"], asked["options"]
    prompt = asked["text"] if "text" in asked else asked["messages"][-1]["content"]
    words = prompt.split()
    room = CONTEXT - len(words)
    if room < 1:
        return send(type="error", id=id, kind="context", prompt_tokens=len(words), message="too long")
    if "refuse" in words:
        return send(type="error", id=id, kind="refused", message="I do not like this.")
    send(type="started", id=id, prompt_tokens=len(words))
    if "stderr" in words:
        for number in range(5000):
            print(f"line {number}", "x" * 2000, file=sys.stderr)
    drawn = random.Random(options.get("seed"))
    limit = min(room, asked["max_tokens"] or room)
    word = model.first(prompt)
    for number in range(limit):
        if cancelled.is_set() and "deaf" not in words:
            return send(type="done", id=id, reason="cancelled")
        send(type="token", id=id, text=word if number == 0 else " " + word)
        if number == 1:
            misbehave(words, id)
        word = model.after(word, options.get("temperature", 0), drawn)
        time.sleep(PACE_S)
    send(type="done", id=id, reason="length")


def misbehave(words, id):
    if "crash" in words:
        os._exit(3)
    if "hang" in words:
        written.acquire()
        time.sleep(600)
    if "half" in words:
        with written:
            sys.stdout.buffer.write(b'{"type": "token", "id": "%s", "text": "\xf0\x9f"}\n' % id.encode())
            sys.stdout.buffer.flush()
    if "surrogate" in words:
        send(type="token", id=id, text="\ud83d")
    if "long" in words:
        with written:
            while True:
                sys.stdout.buffer.write(b"x" * 65536)
                sys.stdout.buffer.flush()
    if "many" in words:
        for _ in range(1000):
            send(type="token", id=id, text=" more")
    if "stranger" in words:
        send(type="token", id="nobody", text="for nobody")
    if "noise" in words:
        with written:
            sys.stdout.buffer.write(b"Loading layer 7...\n")
            sys.stdout.buffer.flush()
    if "mute" in words:
        time.sleep(600)


def main():
    model = Model(sys.argv[1])
    version = int(os.environ.get("WORDS_VERSION", "1"))
    running = {}
    for line in sys.stdin.buffer:
        message = json.loads(line)
        match message["type"]:
            case "hello":
                options = ["seed", "min_tokens"]
                send(
                    type="hello",
                    version=version,
                    inputs=["messages", "text"],
                    options=options,
                    at_once=4,
                    news="later",
                )
            case "load":
                if message["settings"].get("missing"):
                    send(type="error", kind="failed", message="there is no such file")
                else:
                    send(type="loaded", model=message["model"], context_length=CONTEXT)
            case "generate":
                cancelled = running[message["id"]] = threading.Event()
                threading.Thread(target=answer, args=(model, message, cancelled), daemon=True).start()
            case "cancel":
                if (cancelled := running.get(message["id"])) is not None:
                    cancelled.set()
            case "ping":
                send(type="pong")


main()
