#!/usr/bin/env python3
"""What the compiler does not see: who may include what, sizes, leftovers, the schema's shape.

    python3 tests/lint.py              check the repository; file:line messages, exit 1 if any
    python3 tests/lint.py --self-test  plant a fault for every rule in a small tree; exit 1 unless
                                       each is found

Needs Python 3.8 and nothing else.
"""
import os
import re
import sys
import tempfile

ROOMS = ("proto", "paging", "moe", "cuda", "daemon", "clients", "tests", "bench")

# What other rooms may see of each room.
DOORS = {
    "proto": {"proto/base.h", "proto/wire.h"},
    "paging": {"paging/paging.h"},
    "moe": {"moe/moe.h", "moe/backend.h", "moe/text.h", "moe/quant.h", "moe/sampler.h",
            "moe/gguf.h", "moe/placement.h", "moe/offload.h"},
    "cuda": {"cuda/cuda_backend.h"},
    "daemon": set(),
    "clients": {"clients/lib/client.h"},
}
ALL_DOORS = set().union(*DOORS.values())

# What each room may include besides its own headers.
EDGES = {
    "proto": set(),
    "paging": {"proto/base.h"},
    "moe": {"proto/base.h"},
    "cuda": {"proto/base.h", "moe/backend.h", "moe/moe.h", "moe/offload.h", "moe/quant.h",
             "moe/sampler.h"},
    "daemon": DOORS["proto"] | DOORS["paging"] | DOORS["moe"] | DOORS["cuda"],
    "clients": {"proto/base.h", "proto/wire.h", "moe/text.h"},
    "tests": ALL_DOORS,
    "bench": ALL_DOORS,
}

# The one file that chooses among the implementers of moe/backend.h, and the one through which cuda/ meets other ranks.
EXTRA = {"moe/model.c": {"cuda/cuda_backend.h"}, "cuda/exchange.h": {"moe/exchange.h"}}

# Libraries, by the start of the header's name, and the files that may see them.
LIBRARIES = (
    ("moed.pb-c.h", r"proto/wire\w*\.c$"),
    ("protobuf-c/", r"proto/wire\w*\.c$"),
    ("zmq", r"(daemon|clients|tests)/"),
    ("cuda", r"(cuda/|tests/test_cuda)"),
    ("nccl", r"cuda/nccl\.c$"),
)

MAX_LINES = 800
CODE = (".c", ".h", ".cu", ".cuh")
SIZED = CODE + (".py", ".sh", ".proto")
TEXT = SIZED + (".txt", ".cmake", ".md", ".json", ".yml", ".yaml", ".service", ".in")
SKIPPED = {"build", "data", "node_modules", "__pycache__"}

INCLUDE = re.compile(r'\s*#\s*include\s*(["<])([^">]+)[">]')
LEFTOVER = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3)) + r")\b")
FIELD = re.compile(r"message\s+(\w+)\s*\{|"
                   r"(optional|required|repeated)\s+(\w+)\s+(\w+)\s*=\s*(\d+)")
MACHINE_PATH = re.compile(r"(?<![\w./$}])/(work|root|home|Users)/")


class Lint:
    def __init__(self, root):
        self.root = root
        self.messages = []

    def say(self, path, line, text):
        self.messages.append("%s:%d: %s" % (path, line, text))

    def files(self):
        for folder, folders, names in os.walk(self.root):
            # .ci and the like are ours; .git and virtual environments are not.
            folders[:] = sorted(f for f in folders
                                if f not in SKIPPED and (not f.startswith(".") or f == ".ci"))
            for name in sorted(names):
                path = os.path.relpath(os.path.join(folder, name), self.root)
                if name.endswith(TEXT) or path.startswith(".ci"):
                    yield path.replace(os.sep, "/")

    def read(self, path):
        with open(os.path.join(self.root, path), encoding="utf-8", errors="replace") as f:
            return f.read().split("\n")

    def run(self):
        for path in self.files():
            lines = self.read(path)
            self.check_text(path, lines)
            if path.endswith(CODE):
                self.check_includes(path, lines)
            if path.endswith(".proto"):
                self.check_schema(path, lines)
        return self.messages

    def check_text(self, path, lines):
        n_lines = len(lines) - (lines[-1] == "")
        if path.endswith(SIZED) and n_lines > MAX_LINES:
            self.say(path, n_lines, "has %d lines: at most %d" % (n_lines, MAX_LINES))
        for i, line in enumerate(lines, 1):
            found = LEFTOVER.search(line)
            if found:
                self.say(path, i, "leaves a %s: do it, or say it in an issue" % found.group(1))
            found = MACHINE_PATH.search(line)
            if found:
                self.say(path, i, "names a path of one machine, %s" % found.group(0))

    # ---- includes ------------------------------------------------------------------------------

    def check_includes(self, path, lines):
        room = path.split("/")[0]
        if room not in ROOMS:
            self.say(path, 1, "is in no room: the rooms are " + ", ".join(ROOMS))
            return
        opened = {}  # rooms whose private headers a test opens, and the first line that does
        for i, line in enumerate(lines, 1):
            found = INCLUDE.match(line)
            if not found:
                continue
            quote, header = found.groups()
            for start, who in LIBRARIES:
                if header.startswith(start) and "/" not in header.replace("protobuf-c/", "") \
                        and not re.match(who, path):
                    self.say(path, i, "may not include %s" % header)
            if quote == "<" or header == "moed.pb-c.h":
                continue
            self.check_edge(path, i, header, opened)
        if len(opened) > 1:
            self.say(path, max(opened.values()), "opens the private headers of more than one room: "
                     + ", ".join(sorted(opened)))

    def check_edge(self, path, i, header, opened):
        room, target = path.split("/")[0], header.split("/")[0]
        if target not in ROOMS or not os.path.isfile(os.path.join(self.root, header)):
            self.say(path, i, 'includes "%s", which is no file when read from the repository root'
                     % header)
            return
        if header.endswith(".c"):
            self.say(path, i, "includes a .c file")
        if target == room or header in EDGES[room] or header in EXTRA.get(path, ()):
            return
        if room == "tests" and target != "bench":
            opened.setdefault(target, i)
            return
        self.say(path, i, "%s/ may not include %s" % (room, header))

    # ---- the schema ----------------------------------------------------------------------------

    def check_schema(self, path, lines):
        """Acyclic, at most 4 messages deep, no maps, oneofs or strings, no repeated floats (the
        decoder looks for numbers that are not finite in single fields), each number once."""
        fields, where, message = {}, {}, None
        for i, line in enumerate(lines, 1):
            code = line.split("//")[0]
            for word in re.findall(r"\b(map|oneof|string|group|extend|extensions|import)\b", code):
                self.say(path, i, "uses %s" % word)
            for token in FIELD.finditer(code):
                if token.group(1):
                    message = token.group(1)
                    fields[message], where[message] = [], i
                elif token.group(2):
                    label, kind, name, number = token.group(2, 3, 4, 5)
                    if label == "required":
                        self.say(path, i, "%s is required: it could never be left out again" % name)
                    if label == "repeated" and kind in ("float", "double"):
                        self.say(path, i, "%s is a repeated %s" % (name, kind))
                    if number in [n for _, n in fields[message]]:
                        self.say(path, i, "number %s is taken" % number)
                    fields[message].append((kind, number))
        for name in fields:
            depth = self.depth(fields, name, ())
            if depth is None:
                self.say(path, where[name], "%s contains itself" % name)
            elif depth > 4:
                self.say(path, where[name], "%s is %d messages deep: at most 4" % (name, depth))

    def depth(self, fields, name, above):
        """Messages on the longest way down from name, itself included; None if it comes back."""
        if name in above:
            return None
        below = [self.depth(fields, kind, above + (name,)) for kind, _ in fields[name]
                 if kind in fields]
        return None if None in below else 1 + max(below, default=0)


# ---- the lint's own test -----------------------------------------------------------------------

CLEAN = {
    "proto/base.h": "#include <stddef.h>\n",
    "proto/wire.h": '#include "proto/base.h"\n',
    "proto/wire_decode.c": '#include "moed.pb-c.h"\n#include "proto/wire.h"\n',
    "proto/moed.proto": "message A { optional B b = 1; }\nmessage B { repeated C c = 1; }\n"
                        "message C { optional D d = 1; }\nmessage D { optional float x = 1; }\n",
    "paging/paging.h": '#include "proto/base.h"\n',
    "paging/pool.h": '#include "paging/paging.h"\n',
    "moe/moe.h": '#include "proto/base.h"\n',
    "moe/text.h": '#include "proto/base.h"\n',
    "moe/backend.h": '#include "moe/moe.h"\n',
    "moe/inner.h": '#include "moe/moe.h"\n',
    "moe/model.c": '#include "cuda/cuda_backend.h"\n#include "moe/inner.h"\n',
    "cuda/cuda_backend.h": '#include "moe/backend.h"\n#include <cuda_runtime.h>\n',
    "daemon/sched.h": '#include "moe/moe.h"\n#include "paging/paging.h"\n',
    "daemon/net.c": '#include <zmq.h>\n#include "proto/wire.h"\n#include "moe/text.h"\n',
    "clients/lib/client.h": '#include "proto/wire.h"\n#include "moe/text.h"\n',
    "tests/support.h": '#include "proto/base.h"\nchar *t = "moed-XXXXXX";\n',
    "tests/test_paging.c": '#include "tests/support.h"\n#include "paging/pool.h"\n',
    "tests/data/far.c": '#include "nowhere.h"\n' * 900,
    "bench/bench_x.c": '#include "moe/moe.h"\n' + "\n" * 799,
    "README.md": "network/root/ and $HOME/work/ and a/home/b are no paths of a machine\n",
}

# File, what it holds, and the message that must come of it.
FAULTS = (
    ("proto/base.h", '#include "moe/moe.h"\n', "proto/base.h:1: proto/ may not include moe/moe.h"),
    ("paging/pool.h", '\n#include "proto/wire.h"\n', "paging/pool.h:2: paging/ may not include"),
    ("paging/x.c", '#include "moe/moe.h"\n', "paging/x.c:1: paging/ may not include moe/moe.h"),
    ("moe/x.c", '#include "paging/paging.h"\n', "moe/x.c:1: moe/ may not include"),
    ("moe/x.c", '#include "cuda/cuda_backend.h"\n', "moe/x.c:1: moe/ may not include cuda/"),
    ("moe/x.c", '#include "proto/wire.h"\n', "moe/x.c:1: moe/ may not include proto/wire.h"),
    ("cuda/x.cu", '#include "moe/text.h"\n', "cuda/x.cu:1: cuda/ may not include moe/text.h"),
    ("cuda/x.cu", '#include "moe/inner.h"\n', "cuda/x.cu:1: cuda/ may not include moe/inner.h"),
    ("daemon/x.c", '#include "moe/inner.h"\n', "daemon/x.c:1: daemon/ may not include"),
    ("daemon/x.c", '#include "paging/pool.h"\n', "daemon/x.c:1: daemon/ may not include"),
    ("daemon/x.c", '#include "clients/lib/client.h"\n', "daemon/x.c:1: daemon/ may not include"),
    ("clients/x.c", '#include "daemon/sched.h"\n', "clients/x.c:1: clients/ may not include"),
    ("clients/x.c", '#include "moe/moe.h"\n', "clients/x.c:1: clients/ may not include moe/moe.h"),
    ("bench/x.c", '#include "paging/pool.h"\n', "bench/x.c:1: bench/ may not include"),
    ("bench/x.c", '#include "tests/support.h"\n', "bench/x.c:1: bench/ may not include"),
    ("tests/x.c", '#include "paging/pool.h"\n\n#include "moe/inner.h"\n',
     "tests/x.c:3: opens the private headers of more than one room: moe, paging"),
    ("proto/x.c", '#  include "base.h"\n', 'proto/x.c:1: includes "base.h", which is no file'),
    ("proto/x.c", '#include "../proto/base.h"\n', "which is no file when read from the repo"),
    ("proto/x.c", '#include "proto/gone.h"\n', "proto/x.c:1: includes \"proto/gone.h\""),
    ("tests/x.c", '#include "moe/model.c"\n', "tests/x.c:1: includes a .c file"),
    ("daemon/x.c", '#include "moed.pb-c.h"\n', "daemon/x.c:1: may not include moed.pb-c.h"),
    ("proto/base.h", '#include "moed.pb-c.h"\n', "proto/base.h:1: may not include moed.pb-c.h"),
    ("proto/other.c", "#include <protobuf-c/protobuf-c.h>\n", "proto/other.c:1: may not include"),
    ("moe/x.c", "#include <zmq.h>\n", "moe/x.c:1: may not include zmq.h"),
    ("moe/x.c", "#include <cuda_fp16.h>\n", "moe/x.c:1: may not include cuda_fp16.h"),
    ("extra/x.c", "\n", "extra/x.c:1: is in no room"),
    ("bench/x.c", "\n" * 801, "bench/x.c:801: has 801 lines"),
    ("bench/x.py", "\n" * 801, "bench/x.py:801: has 801 lines"),
    ("moe/x.c", "\n/* TO" "DO: more */\n", "moe/x.c:2: leaves a TO" "DO"),
    ("README.md", "FIX" "ME\n", "README.md:1: leaves a FIX" "ME"),
    ("x.sh", "# X" "XX\n", "x.sh:1: leaves a X" "XX"),
    (".ci/run", "cd /work" "/x\n", ".ci/run:1: names a path of one machine"),
    ("bench/x.md", "\n\nfrom /root" "/x\n", "bench/x.md:3: names a path of one machine"),
    ("proto/moed.proto", "message A { optional A a = 1; }\n", "moed.proto:1: A contains itself"),
    ("proto/moed.proto", "message A { optional B b = 1; }\nmessage B { repeated A a = 1; }\n",
     "moed.proto:2: B contains itself"),
    ("proto/moed.proto", "".join("message M%d { optional M%d m = 1; }\n" % (i, i + 1)
                                 for i in range(4)) + "message M4 {}\n",
     "moed.proto:1: M0 is 5 messages deep"),
    ("proto/moed.proto", "message A {\n map<int32, int32> m = 1;\n}\n", "moed.proto:2: uses map"),
    ("proto/moed.proto", "message A { oneof x { int32 a = 1; } }\n", "moed.proto:1: uses oneof"),
    ("proto/moed.proto", "message A { optional string s = 1; }\n", "moed.proto:1: uses string"),
    ("proto/moed.proto", "message A { required int32 s = 1; }\n", "s is required"),
    ("proto/moed.proto", "message A { repeated float s = 1; }\n", "s is a repeated float"),
    ("proto/moed.proto", "message A {\n optional int32 a = 1;\n optional bytes b = 1;\n}\n",
     "moed.proto:3: number 1 is taken"),
)


def write(root, path, text):
    full = os.path.join(root, path)
    os.makedirs(os.path.dirname(full), exist_ok=True)
    with open(full, "w", encoding="utf-8") as f:
        f.write(text)


def self_test():
    failures = []
    with tempfile.TemporaryDirectory() as root:
        for path, text in CLEAN.items():
            write(root, path, text)
        failures += ["clean tree: " + m for m in Lint(root).run()]
        for path, text, expected in FAULTS:
            write(root, path, text)
            messages = Lint(root).run()
            if not any(expected in m for m in messages):
                failures.append("%s: no message '%s' in %s" % (path, expected, messages))
            if path in CLEAN:
                write(root, path, CLEAN[path])
            else:
                os.remove(os.path.join(root, path))
        failures += ["afterwards: " + m for m in Lint(root).run()]
    for f in failures:
        print("self-test:", f)
    print("self-test: %d faults planted, %d failures" % (len(FAULTS), len(failures)))
    return 1 if failures else 0


def main():
    if sys.argv[1:] == ["--self-test"]:
        return self_test()
    if sys.argv[1:]:
        print(__doc__)
        return 2
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    messages = Lint(root).run()
    for m in messages:
        print(m)
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main())
