"""A program that answers one question, as the dialect "cli" has it: it knows nothing of petals-win.

    once.py TEXT [--prompt=PROMPT] [-n TOKENS] [--temp NUMBER] [--seed NUMBER]

Its model is which character follows which two in a text; a character is a token. Without --prompt it reads its standard input. Words of a
prompt make it behave badly: crash, hang, flood, half, cut, latin, deaf, brood, stderr, tell.
"""

import argparse
import random
import signal
import subprocess
import sys
import time
import zlib
from collections import defaultdict

PACE_S = 0.0005


def write(data):
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def chains(path):
    with open(path, encoding="utf-8") as file:
        text = "".join(c for c in " ".join(file.read().split()) if c.isascii())
    after = defaultdict(list)
    for one, two, three in zip(text, text[1:], text[2:] + text[:2], strict=False):
        after[one + two].append(three)
    return text, after


def misbehave(words):
    if "stderr" in words:
        print("loading\nthe last line", file=sys.stderr, flush=True)
    if "crash" in words:
        sys.exit(3)
    if "deaf" in words:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        write(b"never")
    if "brood" in words:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        write(b"never alone")
    if "deaf" in words or "hang" in words or "brood" in words:
        time.sleep(600)
    while "flood" in words:
        write(b"x" * 65536)
    if "half" in words:
        for byte in "🙂é".encode():
            write(bytes([byte]))
            time.sleep(0.02)
        sys.exit(0)
    if "cut" in words:
        write("well 🙂".encode()[:-2])
        sys.exit(0)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("text")
    parser.add_argument("--prompt")
    parser.add_argument("-n", type=int, default=100)
    parser.add_argument("--temp", type=float, default=0)
    parser.add_argument("--seed", type=int)
    asked = parser.parse_args()
    prompt = sys.stdin.buffer.read().decode() if asked.prompt is None else asked.prompt
    if "tell" in prompt:
        return write(prompt.encode())
    write(b"so ") if asked.n > 3 and "crash" in prompt else None
    misbehave(prompt.replace("<", " ").replace(">", " ").split())
    text, after = chains(asked.text)
    drawn = random.Random(asked.seed)
    begin = zlib.crc32(prompt.encode()) % (len(text) - 2)
    pair = text[begin : begin + 2]
    for _ in range(asked.n):
        following = drawn.choice(after[pair]) if asked.temp else after[pair][begin % len(after[pair])]
        write(following.encode())
        pair = pair[1] + following
        time.sleep(PACE_S)


main()
