"""moed-cli and moed-load as their users meet them: output, exit codes, files, signals."""

import csv
import json
import os
import pty
import select
import resource
import signal
import sys
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from fake import PATIENCE, Case

COMMANDS = ["chat", "generate", "batch", "tokenize", "detokenize", "info", "health", "stats"]


class Generate(Case):
    def test_sources(self):
        self.serve()
        self.assertEqual(self.cli("generate", "-p", "héllo"), "echo: héllo\n")
        self.assertEqual(self.cli("generate", stdin="from stdin\n"), "echo: from stdin\n")
        self.assertEqual(self.cli("generate", "-f", self.write("p", "two\nlines\n")), "echo: two\nlines\n")
        counts = self.fake.stop()
        self.assertEqual(counts["submits"], 3)
        self.assertEqual(counts["bad_boot_ids"], 0)

    def test_defaults(self):
        self.serve()
        self.assertEqual(
            self.cli("generate", "-p", "!submit"),
            "temperature=0 top_k=0 top_p=1 min_p=0 repetition=1 presence=0 frequency=0 logprobs=0 "
            "top_logprobs=0 max_tokens=256 min_tokens=0 ignore_eos=0 priority=1 ttl_ms=0 n=1 parse_special=1\n")

    def test_every_flag(self):
        self.serve()
        out = self.cli(
            "generate", "-p", "!submit", "--temperature", "0.5", "--top-k", "3", "--top-p", "0.25", "--min-p",
            "0.125", "--repetition-penalty", "1.5", "--presence-penalty", "-1", "--frequency-penalty", "2",
            "--seed", "42", "--bias", "7=-2.5", "--bias", "8=1", "--stop", "END", "--stop", "two words",
            "--stop-id", "99", "--max-tokens", "1000", "--min-tokens", "5", "--ignore-eos", "--ttl-ms",
            "60000", "--priority", "2", "--raw-special")
        self.assertEqual(
            out,
            "temperature=0.5 top_k=3 top_p=0.25 min_p=0.125 repetition=1.5 presence=-1 frequency=2 logprobs=0 "
            "top_logprobs=0 max_tokens=1000 min_tokens=5 ignore_eos=1 priority=2 ttl_ms=60000 n=1 "
            "parse_special=0 seed=42 bias=7:-2.5 bias=8:1 stop=END stop=two words stop_id=99\n")

    def test_choices(self):
        self.serve()
        self.assertEqual(self.cli("generate", "-p", "x", "-n", "3"),
                         "echo: x\n--- choice 1 ---\necho: x #1\n--- choice 2 ---\necho: x #2\n")

    def test_logprobs(self):
        self.serve()
        lines = self.cli("generate", "-p", "é", "--logprobs", "2", "--max-tokens", "7").splitlines()
        self.assertEqual(len(lines), 7)
        self.assertEqual(lines[1].split(), ["99", "-0.1250", '"c"', "|", "65", '"A"', "-1.0000,", "66", '"B"',
                                            "-2.0000"])
        self.assertEqual(lines[6].split()[:3], ["233", "-0.7500", '"é"'])

    def test_verbose(self):
        self.serve()
        self.cli("generate", "-p", "abc", "-v", "--max-tokens", "4")
        self.assertEqual(
            self.stderr,
            "[3 prompt tokens (0 cached), 4 new, first after 3 ms, 1333.3 tokens/s, ended by length]\n")

    def test_usage(self):
        self.serve()
        for args in (["-p", "x", "-f", "y"], ["-p", ""], ["-p", "x", "--top-p", "0"], ["-p", "x", "--bias", "5"],
                     ["-p", "x", "--bias", "=1"], ["-p", "x", "--stop", ""], ["-p", "x", "-n", "17"],
                     ["-p", "x", "--min-tokens", "9", "--max-tokens", "8"], ["-f", "/no/such/file"],
                     ["-p", "x", "--priority", "3"], ["stray"], ["-p", "x", "--stop-id", "a"]):
            self.cli("generate", *args, code=2)
            self.assertTrue(self.stderr.startswith("moed-cli generate: "), self.stderr)
        self.assertEqual(self.fake.stop()["submits"], 0)

    def test_failures(self):
        self.cli("generate", "-p", "x", "--timeout", "100", code=3)
        self.assertIn("is the daemon running?", self.stderr)
        self.serve(fault="reject", at=1)
        self.cli("generate", "-p", "x", code=1)
        self.assertIn("rejected: OVERLOADED: made to reject", self.stderr)
        self.cli("generate", "-p", "!fail", code=1)
        self.assertIn("failed: NUMERIC: made to fail", self.stderr)

    def test_broken_streams(self):
        for fault in ("gap", "bad_hash", "bad_body"):
            with self.subTest(fault):
                fake = self.serve(fault=fault, at=1)
                self.cli("generate", "-p", "a long enough prompt", code=3)
                fake.kill()

    def test_server_dies(self):
        self.serve(fault="die", at=3, tokens_per_chunk=1)
        self.assertEqual(self.cli("generate", "-p", "x", code=3), "ech")
        self.assertIn("the server closed the connection", self.stderr)

    def test_interrupt_cancels(self):
        fake = self.serve(answer_tokens=8000, tokens_per_chunk=1, chunk_us=1000)
        p = self.start("moed-cli", "generate", "-p", "x", "--max-tokens", "8000")
        self.assertEqual(p.stdout.read(4), "echo")
        p.send_signal(signal.SIGINT)
        _, err = p.communicate(timeout=PATIENCE)
        self.assertEqual(p.returncode, 1)
        self.assertEqual(err, "moed-cli generate: cancelled\n")
        self.assertEqual(fake.stop()["cancelled"], 1)

    def test_closed_output_cancels(self):
        fake = self.serve(answer_tokens=8000, tokens_per_chunk=1, chunk_us=1000)
        p = self.start("moed-cli", "generate", "-p", "x", "--max-tokens", "8000")
        self.assertEqual(p.stdout.read(4), "echo")
        p.stdout.close()
        p.stderr.read()
        self.assertEqual(p.wait(timeout=PATIENCE), 1)
        p.stderr.close()
        self.assertEqual(fake.stop()["cancelled"], 1)


class Chat(Case):
    def test_one_question(self):
        self.serve()
        self.assertEqual(self.cli("chat", "-p", "What?"), "echo: What?\n")
        self.cli("chat", "-p", "!fail", code=1)

    def test_conversation(self):
        self.serve()
        out = self.cli("chat", "--system", "S", stdin="one\n\n!submit\n/reset\n/nonsense\n!submit\n/exit\nnever\n")
        turns = out.splitlines()
        self.assertEqual(turns[0], "echo: one")
        self.assertTrue(turns[1].endswith(
            " role=system content=S role=user content=one role=assistant content=echo: one role=user "
            "content=!submit"), turns[1])
        self.assertTrue(turns[2].endswith("parse_special=1 role=system content=S role=user content=!submit"))
        self.assertEqual(len(turns), 3)
        self.assertIn("/reset and /exit", self.stderr)

    def test_failed_turn_is_forgotten(self):
        self.serve()
        out = self.cli("chat", stdin="!fail\n!submit\n", code=1)
        self.assertTrue(out.rstrip().endswith("parse_special=1 role=user content=!submit"), out)

    def on_terminal(self, *args):
        """Run moed-cli on a terminal of its own."""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update(self.environment())
            os.execv(f"{os.environ['TEST_BIN']}/moed-cli", ["moed-cli", *args])
        self.seen = b""

    def expect(self, text):
        """Read until text has come; returns what came up to it."""
        while text.encode() not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], 120)
            self.assertTrue(ready, f"no {text!r} after {self.seen[-200:]!r}")
            self.seen += os.read(self.fd, 4096)
        end = self.seen.index(text.encode()) + len(text.encode())
        out, self.seen = self.seen[:end], self.seen[end:]
        return out.decode()

    def leave(self):
        _, status = os.waitpid(self.pid, 0)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)

    def test_terminal(self):
        """Ctrl-C stops an answer and not the program; what was said stays in the conversation."""
        # Left alone, the answer would take a minute: Ctrl-C is what ends it.
        fake = self.serve(tokens_per_chunk=1, chunk_us=60000)
        self.on_terminal("chat")
        self.expect("> ")
        os.write(self.fd, b"z" * 1000 + b"\n")
        self.expect("echo: zz")
        os.write(self.fd, b"\x03")
        self.expect("cancelled")
        self.expect("> ")
        os.write(self.fd, b"!submit\n")
        seen = self.expect("content=!submit\r\n")
        self.assertIn("role=assistant content=echo: zz", seen)
        self.expect("> ")
        os.write(self.fd, b"\x03")
        self.expect("Ctrl-D leaves")
        self.expect("> ")
        os.write(self.fd, b"\x04")
        self.assertEqual(self.leave(), 0)
        self.assertEqual(fake.stop()["cancelled"], 1)

    def test_terminal_is_not_driven(self):
        self.serve()
        self.on_terminal("chat", "-p", "a\x1b]0;title\x07b")
        self.assertEqual(self.expect("?b"), "echo: a?]0;title?b")
        self.assertEqual(self.leave(), 0)


class Questions(Case):
    def test_tokens(self):
        self.serve()
        self.assertEqual(self.cli("tokenize", "aé€"), "97 233 8364\n")
        self.assertEqual(self.cli("tokenize", stdin="a\n"), "97 10\n")
        self.assertEqual(self.cli("tokenize", "--chat", "ab"), "97 98\n")
        self.assertEqual(self.cli("detokenize", "97", "233,8364 98"), "aé€b\n")
        self.assertEqual(self.cli("detokenize", "-f", "-", stdin="\n".join(["97"] * 3000)), "a" * 3000 + "\n")
        self.cli("detokenize", code=2)
        self.cli("detokenize", "x", code=2)
        self.cli("tokenize", "a", "b", code=2)

    def test_info(self):
        self.serve()
        out = self.cli("info")
        for line in ("server             fake 1, protocol 1.0", "experts            4, 2 per token",
                     "requests at once   8 per session", "weights            1.0 MiB"):
            self.assertIn(line + "\n", out)
        self.assertEqual(self.cli("health"), "ready OK, up 1.0 s, last step 0.0 s ago\n")
        self.assertEqual(json.loads(self.cli("stats", "--json")),
                         {"requests_total": 0, "expert_reads": 250, "expert_reads_ungrouped": 1000})
        self.assertEqual(self.cli("stats").split()[2:4], ["expert_reads", "250"])

    def test_no_answer(self):
        self.serve(fault="deaf")
        self.cli("info", "--timeout", "300", code=1)
        self.assertIn("TIMEOUT: no answer to ModelInfo", self.stderr)

    def test_help(self):
        self.assertIn("batch", self.cli("--help"))
        for command in COMMANDS:
            out = self.cli(command, "--help")
            self.assertTrue(out.startswith(f"usage: moed-cli {command}"), out)
            self.assertIn("--endpoint URI", out)
            self.assertIn("3 no", out)  # the exit codes are told
        self.assertIn("--show-answers", self.load("--help"))
        self.cli(code=2)
        self.cli("serve", code=2)


def chat_line(custom_id, content, **body):
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": [{"role": "user", "content": content}], **body}}


def completion_line(custom_id, prompt, **body):
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions",
            "body": {"model": "m", "prompt": prompt, **body}}


def lines(objects):
    return "".join(json.dumps(o) + "\n" for o in objects)


class Batch(Case):
    def batch(self, *args, code=0):
        self.cli("batch", "-i", self.path("in"), "-o", self.path("out"), *args, code=code)

    def results(self):
        """custom_id -> result; every line whole, every id once."""
        out = {}
        for line in self.read("out").splitlines():
            result = json.loads(line)
            self.assertNotIn(result["custom_id"], out)
            out[result["custom_id"]] = result
        return out

    def test_shapes(self):
        self.serve()
        self.write("in", lines([
            chat_line("c", "hé", n=2, max_tokens=7),
            completion_line("p", "hi", logprobs=1, max_tokens=2),
            completion_line("ids", [1, 2], max_tokens=3),
            chat_line("lp", "x", logprobs=True, top_logprobs=1, max_tokens=1),
        ]))
        self.batch()
        results = self.results()
        chat = results["c"]
        self.assertIsNone(chat["error"])
        self.assertEqual(chat["response"]["status_code"], 200)
        body = chat["response"]["body"]
        self.assertEqual(body["object"], "chat.completion")
        self.assertEqual(body["model"], "fake")
        self.assertEqual(body["choices"], [
            {"index": i, "message": {"role": "assistant", "content": "echo: h"}, "logprobs": None,
             "finish_reason": "length"} for i in (0, 1)])
        self.assertEqual(body["usage"], {"prompt_tokens": 1, "completion_tokens": 14, "total_tokens": 15,
                                         "prompt_tokens_details": {"cached_tokens": 0}})
        body = results["p"]["response"]["body"]
        self.assertEqual(body["object"], "text_completion")
        self.assertEqual(body["choices"], [{
            "index": 0, "text": "ec", "finish_reason": "length",
            "logprobs": {"tokens": ["e", "c"], "token_logprobs": [0.0, -0.125],
                         "top_logprobs": [{"A": -1.0}, {"A": -1.0}], "text_offset": [0, 1]}}])
        self.assertEqual(results["ids"]["response"]["body"]["choices"][0]["text"], "def")
        self.assertEqual(results["lp"]["response"]["body"]["choices"][0]["logprobs"], {"content": [
            {"token": "e", "logprob": 0.0, "bytes": None,
             "top_logprobs": [{"token": "A", "logprob": -1.0, "bytes": None}]}]})

    def test_sampling_reaches_the_server(self):
        self.serve()
        self.write("in", lines([chat_line("a", "!submit", temperature=0.5, top_p=0.25, seed=9, stop=["x", "y"],
                                          max_completion_tokens=999, top_k=4)]))
        self.batch()
        text = self.results()["a"]["response"]["body"]["choices"][0]["message"]["content"]
        self.assertEqual(
            text,
            "temperature=0.5 top_k=4 top_p=0.25 min_p=0 repetition=1 presence=0 frequency=0 logprobs=0 "
            "top_logprobs=0 max_tokens=999 min_tokens=0 ignore_eos=0 priority=2 ttl_ms=0 n=1 parse_special=1 "
            "seed=9 stop=x stop=y role=user content=!submit")

    def test_concurrency(self):
        for args, most in ((["-c", "3"], 3), ([], 8), (["-c", "100"], 8)):
            with self.subTest(most=most, args=args):
                fake = self.serve(chunk_us=500)
                self.write("in", lines(chat_line(str(i), "x" * 40) for i in range(60)))
                self.batch(*args)
                self.assertEqual(len(self.results()), 60)
                self.assertEqual(fake.stop()["max_running"], most)
                os.remove(self.path("out"))

    def test_errors_become_lines(self):
        self.serve()
        bad_url = chat_line("url", "x")
        bad_url["url"] = "/v1/embeddings"
        bad_method = chat_line("method", "x")
        bad_method["method"] = "GET"
        no_body = {"custom_id": "body", "method": "POST", "url": "/v1/completions"}
        self.write("in", lines([
            chat_line("good", "x"), chat_line("tools", "x", tools=[{}]), chat_line("best", "x", best_of=3),
            chat_line("hot", "x", temperature=-1), bad_url, bad_method, no_body, chat_line("fail", "!fail")]))
        self.batch(code=1)
        results = self.results()
        self.assertEqual(len(results), 8)
        self.assertIsNone(results["good"]["error"])
        for name, http, code, word in (
                ("tools", 400, "UNSUPPORTED", "tools"), ("best", 400, "UNSUPPORTED", "best_of"),
                ("hot", 400, "INVALID", "temperature"), ("url", 400, "UNSUPPORTED", "/v1/embeddings"),
                ("method", 400, "UNSUPPORTED", "method"), ("body", 400, "INVALID", "body"),
                ("fail", 500, "NUMERIC", "made to fail")):
            with self.subTest(name):
                error = results[name]["error"]
                self.assertEqual(error["code"], code)
                self.assertIn(word, error["message"])
                self.assertEqual(results[name]["response"]["status_code"], http)
                self.assertEqual(results[name]["response"]["body"]["error"]["message"], error["message"])
        self.assertEqual(self.fake.stop()["submits"], 2)  # only what can be served was sent

    def test_refused_before_anything_is_sent(self):
        fake = self.serve()
        good = json.dumps(chat_line("a", "x"))
        for text, word in (
                (good + "\n{\"custom_id\":", "in:2: not JSON"), (good + "\n" + good + "\n", "in:2: custom_id \"a\""),
                (good + "\n{}\n", "in:2: needs a \"custom_id\""), (good + "\n[1]\n", "in:2: needs"),
                ('{"custom_id":"","url":"u"}', "in:1: needs"), ('{"custom_id":"a","custom_id":"b"}', "in:1: not JSON"),
                ('{"custom_id":7}', "in:1: needs")):
            with self.subTest(text):
                self.write("in", text)
                self.batch(code=2)
                self.assertIn(word, self.stderr)
                self.assertIn("nothing was sent", self.stderr)
                self.assertFalse(os.path.exists(self.path("out")))
        os.remove(self.path("in"))
        self.batch(code=2)
        self.assertEqual(fake.stop()["sessions"], 0)

    def test_blank_lines_and_empty_file(self):
        self.serve()
        self.write("in", "\n" + lines([chat_line("a", "x")]) + "  \n\r\n")
        self.batch()
        self.assertEqual(list(self.results()), ["a"])
        self.write("in", "")
        os.remove(self.path("out"))
        self.batch()
        self.assertEqual(self.read("out"), "")

    def test_foreign_output_is_left_alone(self):
        fake = self.serve()
        self.write("in", lines([chat_line("a", "x"), chat_line("b", "x")]))
        self.batch()
        ours = self.read("out")
        other = ours.replace('"custom_id":"a"', '"custom_id":"z"')
        for text, word in (
                ("my notes", "is not a batch result"), ("my notes\n", "is not a batch result"),
                ("{}\n" + ours, "is not a batch result"), (other, "another batch"), (ours + ours, "repeats"),
                ('{"id":"batch_req_1"}\n' + ours, "out:1 is not a batch result")):
            with self.subTest(text[:40]):
                self.write("out", text)
                self.batch(code=2)
                self.assertIn(word, self.stderr)
                self.assertEqual(self.read("out"), text)
        self.cli("batch", "-i", self.path("in"), "-o", self.path("in"), code=2)
        self.assertEqual(fake.stop()["submits"], 2)

    def test_resume_skips_what_is_there(self):
        fake = self.serve()
        self.write("in", lines(chat_line(str(i), "x") for i in range(10)))
        self.batch()
        first = self.read("out")
        self.batch()
        self.assertEqual(self.read("out"), first)
        kept = first.splitlines(keepends=True)
        self.write("out", "".join(kept[:4]))
        self.batch()
        self.assertTrue(self.read("out").startswith("".join(kept[:4])))
        self.assertEqual(len(self.results()), 10)
        self.assertEqual(fake.stop()["submits"], 16)

    def test_torn_line(self):
        self.serve()
        self.write("in", lines(chat_line(str(i), "x") for i in range(3)))
        self.batch()
        whole = self.read("out")
        ends = [i + 1 for i, c in enumerate(whole) if c == "\n"]
        for cut in (1, 5, 30, ends[0], ends[0] + 1, ends[1] + 17, ends[1] + 100, ends[2] - 1):
            with self.subTest(cut):
                self.write("out", whole[:cut])
                self.batch()
                self.assertEqual(sorted(self.results()), ["0", "1", "2"])
                keep = max([e for e in ends if e <= cut], default=0)
                self.assertTrue(self.read("out").startswith(whole[:keep]))
        self.write("out", whole[:ends[1]] + "\0" * 40)  # a hole, as after a power cut
        self.batch()
        self.assertEqual(sorted(self.results()), ["0", "1", "2"])

    def test_kill_9(self):
        """However often it is killed, each custom_id comes to stand in the output exactly once."""
        self.serve(chunk_us=500)
        n = 400
        self.write("in", lines(chat_line(f"id-{i}", f"question {i}") for i in range(n)))
        kills = 0
        while True:
            p = self.start("moed-cli", "batch", "-i", self.path("in"), "-o", self.path("out"))
            before = os.path.getsize(self.path("out")) if os.path.exists(self.path("out")) else 0
            deadline = time.monotonic() + PATIENCE
            while p.poll() is None and time.monotonic() < deadline:
                if os.path.exists(self.path("out")) and os.path.getsize(self.path("out")) > before + 15000:
                    p.kill()
                    kills += 1
                    break
                time.sleep(0.001)
            p.communicate()
            if p.returncode == 0:
                break
            self.assertEqual(p.returncode, -signal.SIGKILL)
        self.assertGreaterEqual(kills, 3)
        results = self.results()
        self.assertEqual(set(results), {f"id-{i}" for i in range(n)})
        for i in range(n):
            text = results[f"id-{i}"]["response"]["body"]["choices"][0]["message"]["content"]
            self.assertEqual(text, f"echo: question {i}")

    def test_interrupt_and_resume(self):
        fake = self.serve(chunk_us=2000)
        self.write("in", lines(chat_line(str(i), "x" * 30) for i in range(100)))
        p = self.start("moed-cli", "batch", "-i", self.path("in"), "-o", self.path("out"))
        while not os.path.exists(self.path("out")) or os.path.getsize(self.path("out")) == 0:
            time.sleep(0.001)
        second = self.start("moed-cli", "batch", "-i", self.path("in"), "-o", self.path("out"))
        _, err = second.communicate(timeout=PATIENCE)
        self.assertEqual(second.returncode, 2)
        self.assertIn("another moed-cli", err)
        p.send_signal(signal.SIGTERM)
        _, err = p.communicate(timeout=PATIENCE)
        self.assertEqual(p.returncode, 1)
        self.assertIn("goes on where this stopped", err)
        self.assertLess(len(self.results()), 100)
        self.batch()
        self.assertEqual(len(self.results()), 100)
        fake.stop()

    def test_retries(self):
        for fault, at, more in (("reject", 12, 12), ("fail", 3, 1)):
            with self.subTest(fault):
                fake = self.serve(fault=fault, at=at)
                self.write("in", lines(chat_line(str(i), "x") for i in range(20)))
                self.batch()
                self.assertTrue(all(r["error"] is None for r in self.results().values()))
                self.assertEqual(fake.stop()["submits"], 20 + more)
                os.remove(self.path("out"))

    def test_retries_end(self):
        fake = self.serve(fault="reject", at=1000)
        self.write("in", lines([chat_line("a", "x")]))
        self.batch("--retries", "3", code=1)
        self.assertEqual(self.results()["a"]["error"]["code"], "OVERLOADED")
        self.assertEqual(self.results()["a"]["response"]["status_code"], 503)
        self.assertEqual(fake.stop()["submits"], 4)

    def test_server_dies(self):
        fake = self.serve(fault="die", at=60, chunk_us=200)
        self.write("in", lines(chat_line(str(i), "x" * 10) for i in range(50)))
        self.batch(code=3)
        self.assertIn("goes on where this stopped", self.stderr)
        self.assertLess(len(self.results()), 50)
        fake.stop()
        self.serve()
        self.batch()
        self.assertEqual(len(self.results()), 50)

    def test_disk_full(self):
        self.serve()
        self.write("in", lines(chat_line(str(i), "x") for i in range(3)))
        # Python ignores SIGXFSZ; inherited, a write over the limit fails as on a full disk, half done.
        p = self.start("moed-cli", "batch", "-i", self.path("in"), "-o", self.path("out"), restore_signals=False,
                       preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700)))
        _, err = p.communicate(timeout=PATIENCE)
        self.assertEqual(p.returncode, 1)
        self.assertIn("out: File too large", err)
        self.assertEqual(len(self.read("out")), 700)
        self.batch()
        self.assertEqual(sorted(self.results()), ["0", "1", "2"])
        self.cli("batch", "-i", self.path("in"), "-o", "/dev/full", code=2)
        self.assertIn("is not a file", self.stderr)

    def test_summary(self):
        self.serve()
        self.write("in", lines([chat_line("a", "x"), chat_line("b", "!fail")]))
        self.batch(code=1)
        self.assertIn("2 of 2 requests done, 1 of them with an error; 7 tokens", self.stderr)
        self.batch(code=1)  # nothing to do, but one of the results tells of an error
        self.assertIn("2 of 2 are done already", self.stderr)


class Load(Case):
    def report(self, *args, code=0):
        self.out = self.load("--json", self.path("json"), *args, code=code)
        return json.loads(self.read("json"))

    def test_counts(self):
        fake = self.serve(tokens_per_chunk=4)
        r = self.report("-c", "5", "-r", "40", "--prompt-tokens", "30", "--max-tokens", "10")
        self.assertEqual((r["sent"], r["ok"], r["failed"], r["rejected"]), (40, 40, 0, 0))
        self.assertEqual(r["output_tokens"], 400)
        self.assertEqual(r["prompt_tokens"], 1200)
        # 10 tokens come as 4 + 4 + 2: one first token, six later ones per request
        self.assertEqual((r["ttft_ms"]["n"], r["itl_ms"]["n"], r["e2e_ms"]["n"]), (40, 240, 40))
        for times in (r["ttft_ms"], r["itl_ms"], r["e2e_ms"]):
            self.assertTrue(0 < times["p50"] <= times["p90"] <= times["p99"] <= times["max"])
        self.assertTrue(r["e2e_ms"]["max"] >= r["ttft_ms"]["max"])
        self.assertEqual(r["loop"], "closed")
        self.assertEqual(r["sessions"], 1)
        self.assertAlmostEqual(r["output_tokens_per_s"], 400 / r["seconds"], delta=0.01 * 400 / r["seconds"])
        counts = fake.stop()
        self.assertEqual((counts["submits"], counts["max_running"]), (40, 5))

    def test_sessions(self):
        fake = self.serve(max_inflight=8, chunk_us=500)
        r = self.report("-c", "20", "-r", "200")
        self.assertEqual((r["ok"], r["sessions"]), (200, 3))
        counts = fake.stop()
        self.assertEqual(counts["sessions"], 3)
        self.assertEqual(counts["max_running"], 7)  # spread evenly: 7 + 7 + 6

    def test_duration(self):
        self.serve(chunk_us=100)
        r = self.report("--duration", "0.3", "-c", "2", "--max-tokens", "4")
        self.assertGreater(r["sent"], 0)
        self.assertEqual(r["ok"], r["sent"])
        self.assertGreaterEqual(r["seconds"], 0.3)

    def test_open_loop(self):
        """A server that takes one at a time falls behind: the wait counts, though nothing could be sent."""
        fake = self.serve(max_inflight=1, chunk_us=10000, tokens_per_chunk=1)
        r = self.report("--rate", "1000", "-r", "20", "-c", "1", "--max-tokens", "2")
        self.assertEqual((r["ok"], r["loop"]), (20, "open"))
        # The server sleeps 10 ms in each of 19 requests before the last, which was due some 20 ms after the first.
        self.assertGreater(r["ttft_ms"]["max"], 100)
        self.assertEqual(fake.stop()["max_running"], 1)

    def test_verify(self):
        """Asked again, request number i has the same prompt: the fake's answers are a function of it."""
        self.serve()
        r = self.report("-r", "30", "-c", "7", "--verify", "10")
        self.assertEqual((r["ok"], r["verified"], r["verified_same"]), (30, 10, 10))

    def test_verify_catches(self):
        self.serve(fault="unstable")
        r = self.report("-r", "10", "--verify", "5", code=1)
        self.assertEqual(r["verified"], 5)
        self.assertLess(r["verified_same"], 5)
        self.assertIn("asked again alone", self.out)

    def test_broken_streams(self):
        for fault in ("gap", "bad_hash", "bad_body", "strange_id"):
            with self.subTest(fault):
                fake = self.serve(fault=fault, at=2)
                r = self.report("-r", "4", "-c", "2", code=1)
                self.assertGreaterEqual(r["failed"], 1)
                self.assertEqual(r["failed"], r["failed_by"]["CORRUPT"])
                fake.kill()

    def test_rejections(self):
        self.serve(fault="reject", at=3)
        r = self.report("-r", "10", "-c", "2", code=1)
        self.assertEqual((r["ok"], r["rejected"], r["rejected_by"]), (7, 3, {"OVERLOADED": 3}))
        self.assertIn("rejected OVERLOADED", self.out)

    def test_failures(self):
        self.serve(fault="fail", at=2)
        r = self.report("-r", "10", "-c", "2", code=1)
        self.assertEqual((r["ok"], r["failed"], r["failed_by"]), (9, 1, {"ENGINE_LOST": 1}))

    def test_server_dies(self):
        self.serve(fault="die", at=20)
        r = self.report("-r", "100", "-c", "4", code=1)
        self.assertGreater(r["failed_by"]["IO"], 0)
        self.assertLess(r["sent"], 100)
        self.load("-r", "1", "--timeout", "100", code=3)

    def test_prompts(self):
        self.serve()
        path = self.write("p", "one two\n" + json.dumps(
            {"messages": [{"role": "user", "content": "json"}], "max_tokens": 3}) + "\n" + json.dumps(
                completion_line("c", "batch")) + "\n\nlast")
        out = self.load("--prompts", path, "-r", "8", "-c", "1", "--show-answers", "--max-tokens", "50")
        self.assertEqual(out.splitlines()[:8], [
            "  1  one two  echo: one two", "  2  json  ech", "  3  batch  echo: batch", "  4  last  echo: last",
            "  5  one two  echo: one two", "  6  json  ech", "  7  batch  echo: batch", "  8  last  echo: last"])
        for text in ("", "{", '{"messages":3}', '{"prompt":"x","tools":[]}'):
            self.load("--prompts", self.write("q", text), "-r", "1", code=2)

    def test_csv(self):
        self.serve()
        for label in ("first", 'a "quoted", one'):
            self.load("-r", "5", "--max-tokens", "8", "--csv", self.path("csv"), "--label", label)
        with open(self.path("csv"), newline="", encoding="utf-8") as f:
            rows = list(csv.DictReader(f))
        self.assertEqual([row["label"] for row in rows], ["first", 'a "quoted", one'])
        for row in rows:
            self.assertEqual((row["ok"], row["output_tokens"], row["loop"]), ("5", "40", "closed"))
            self.assertNotIn(None, row)
            self.assertTrue(all(value not in (None, "") for value in row.values()))

    def test_usage(self):
        for args in (["--verify", "1", "-t", "1"], ["--show-answers"], ["--rate", "0"], ["-c", "0"], ["x"]):
            self.load(*args, code=2)


if __name__ == "__main__":
    unittest.main(verbosity=2)
