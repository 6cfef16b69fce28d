#!/usr/bin/env python3
"""What is left of the engine's rate when it is served: moed-batched-bench and moed-load do the same work in turns.

    python3 bench/served.py --model tests/data/tiny-moe-q4_k_m.gguf --threads 2 build/release/bin
    python3 bench/served.py --model M.gguf --threads 2 before=A/bin after=B/bin      # two daemons, turn about

For each number of sequences C the engine alone prefills and decodes C of them together, and then moed-load asks a
daemon C requests at a time for answers as long, client and daemon on the same cores. Both rates are tokens of answers
over all the time, prefill and decode. An answer's first token comes of its prompt's last step, so the engine decodes
one token less than an answer has. With several folders of programs, the first one's engine is measured, and then each
one's daemon and client, in each turn. Every process is a new one in each turn, because some are slower than others of
the same program all their life. What stands in one turn is seconds apart: on a machine with other work compare that,
and judge by medians. Prints a CSV row for each C and folder: medians over the turns, `ratio` of served to engine
within turns with its quartiles, and what clients saw. A request that fails ends it with an error."""
import argparse
import contextlib
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

HEAD = ("what,threads,isa,pp,tg,concurrency,turns,requests,engine_tok_s,served_tok_s,ratio,ratio_q1,ratio_q3,"
        "ttft_p50_ms,itl_p50_ms,itl_p90_ms,itl_p99_ms")


def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("programs", nargs="+", help="folders of moed, moed-load and moed-batched-bench, or NAME=FOLDER")
    p.add_argument("--model", required=True)
    p.add_argument("--threads", default="2", help="of the engine (2)")
    p.add_argument("--cpu-isa", default="auto")
    p.add_argument("--concurrency", default="8,32,64", help="sequences at once (8,32,64)")
    p.add_argument("--pp", type=int, default=128, help="tokens of a prompt (128)")
    p.add_argument("--tg", type=int, default=64, help="tokens of an answer (64)")
    p.add_argument("--turns", type=int, default=8, help="(8)")
    p.add_argument("--waves", type=int, default=4, help="requests of a turn, over the concurrency (4)")
    o = p.parse_args()
    o.programs = [(name, pathlib.Path(folder)) for name, _, folder in (a.rpartition("=") for a in o.programs)]
    o.engine = ["--model", o.model, "--threads", o.threads, "--cpu-isa", o.cpu_isa]
    return o


@contextlib.contextmanager
def serve(o, programs, folder):
    """A daemon that is ready; yields its endpoint."""
    endpoint, log = f"ipc://{folder}/moed.sock", pathlib.Path(folder) / "log"
    with log.open("w") as f:
        daemon = subprocess.Popen([programs / "moed", *o.engine, "--listen", endpoint], stderr=f)
    try:
        while "event=ready" not in log.read_text():
            if daemon.poll() is not None:
                sys.exit(f"served.py: moed ended with status {daemon.returncode}:\n{log.read_text()}")
            time.sleep(0.05)
        yield endpoint
    finally:
        daemon.terminate()
        daemon.wait()


def engine_rate(o, n):
    r = json.loads(subprocess.run(
        [o.programs[0][1] / "moed-batched-bench", *o.engine, "--pp", str(o.pp), "--tg", str(o.tg - 1), "--npl", str(n),
         "--repeat", str(o.waves)], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
    return n * o.tg / (r["t_pp"] + r["t_tg"])


def load(o, programs, endpoint, n, waves):
    with tempfile.NamedTemporaryFile() as report:
        subprocess.run([programs / "moed-load", "--endpoint", endpoint, "--concurrency", str(n), "--requests",
                        str(n * waves), "--prompt-tokens", str(o.pp), "--max-tokens", str(o.tg), "--json", report.name],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return json.load(report)


def served_report(o, programs, n):
    with tempfile.TemporaryDirectory() as folder, serve(o, programs, folder) as endpoint:
        load(o, programs, endpoint, n, 1)  # every page touched
        return load(o, programs, endpoint, n, o.waves)


def measure(o, n):
    engine, reports = [], [[] for _ in o.programs]
    for turn in range(o.turns):
        engine.append(engine_rate(o, n))
        order = list(zip(o.programs, reports))
        for (_, programs), mine in order[::-1] if turn % 2 else order:
            mine.append(served_report(o, programs, n))
    for (name, _), mine in zip(o.programs, reports):
        served = [r["output_tokens_per_s"] for r in mine]
        q1, ratio, q3 = statistics.quantiles([s / e for s, e in zip(served, engine)], n=4, method="inclusive")
        seen = [statistics.median(r[kind][p] for r in mine)
                for kind, p in (("ttft_ms", "p50"), ("itl_ms", "p50"), ("itl_ms", "p90"), ("itl_ms", "p99"))]
        print(f"{name},{o.threads},{o.cpu_isa},{o.pp},{o.tg},{n},{o.turns},{n * o.waves},"
              f"{statistics.median(engine):.0f},{statistics.median(served):.0f},{ratio:.3f},{q1:.3f},{q3:.3f},"
              + ",".join(f"{ms:.2f}" for ms in seen), flush=True)


def main():
    o = parse()
    print(HEAD)
    for n in o.concurrency.split(","):
        measure(o, int(n))


if __name__ == "__main__":
    main()
