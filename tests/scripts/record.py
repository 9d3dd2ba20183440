"""Record a command in a terminal of a given width, with the keys that are typed into it.

    python tests/scripts/record.py first.cast --columns 80 -- python train_gpt2.py
    python tests/scripts/record.py stop.cast --press "step 10/" -- python train_gpt2.py --log_dir /tmp/log

The file is an asciicast v2, which `asciinema play` shows. What stood on the screen at the end is printed, and before
that the last line of the screen at each --every seconds, since a progress bar leaves only its last state behind.
--press types Ctrl-C once the text is seen, --press_at after so many seconds. POSIX only.
"""

import argparse
import codecs
import json
import re
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import helpers  # noqa: E402


class Screen:
    """What a terminal shows: text, carriage return, line feed, one line up, erase to the end of the line."""

    def __init__(self, columns):
        self.columns, self.lines, self.row, self.column = columns, [""], 0, 0

    def feed(self, text):
        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.", text, re.DOTALL):
            if part == "\r":
                self.column = 0
            elif part == "\n":
                self._down()
            elif part == "\x1b[A":
                self.row = max(0, self.row - 1)
            elif part == "\x1b[K":
                self.lines[self.row] = self.lines[self.row][: self.column]
            elif not part.startswith("\x1b"):
                if self.column == self.columns:  # a line that is too long goes on below
                    self._down()
                    self.column = 0
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + part + line[self.column + 1 :]
                self.column += 1

    def _down(self):
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append("")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the asciicast to write")
    parser.add_argument("--columns", type=int, default=80)
    parser.add_argument("--press", help="type Ctrl-C once this text has been seen")
    parser.add_argument("--press_at", type=float, help="type Ctrl-C after so many seconds")
    parser.add_argument("--every", type=float, default=10, help="seconds between two looks at the last line [10]")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args(argv)
    terminal = helpers.Terminal(args.command, columns=args.columns, env={"TERM": "xterm-256color"}, threads=None)
    began, seen, pressed, events = time.monotonic(), 0, None, []
    screen, decoder, looked, shown = Screen(args.columns), codecs.getincrementaldecoder("utf-8")("replace"), 0, ""
    while True:
        ended, now, data = terminal.process.poll() is not None, time.monotonic() - began, terminal.bytes
        if len(data) > seen:
            text = decoder.decode(data[seen:])
            events.append([round(now, 3), "o", text])
            screen.feed(text)
            seen = len(data)
        elif ended:
            break
        due = (args.press and args.press in terminal.text) or (args.press_at and now >= args.press_at)
        if due and pressed is None:
            terminal.type("\x03")
            pressed = now
        line = "\n".join(screen.lines).rstrip().rpartition("\n")[2]
        if now - looked >= args.every and line != shown:
            print(f"{now:6.1f} s  {line}", flush=True)
            looked, shown = now, line
        time.sleep(0.05)
    status = terminal.finish()
    head = {"version": 2, "width": args.columns, "height": 24, "command": " ".join(args.command)}
    args.file.write_text("".join(json.dumps(entry) + "\n" for entry in (head, *events)))
    print("\n" + "\n".join(screen.lines).rstrip())
    after = f", {now - pressed:.1f} s after Ctrl-C" if pressed is not None else ""
    print(f"\nexit {status} after {now:.1f} s{after}; the longest line has {max(map(len, screen.lines))} columns")
    return 0


if __name__ == "__main__":
    sys.exit(main())
