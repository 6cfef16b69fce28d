"""The client programs and the daemon itself, on the bundled model."""

import json
import os
import signal
import subprocess
import sys
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from fake import BIN, PATIENCE, Case

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data")
QUESTIONS = os.path.join(os.path.dirname(DATA), "..", "clients", "questions.txt")


class Daemon(Case):
    def setUp(self):
        super().setUp()
        self.daemon = None
        self.addCleanup(self.kill)
        self.start_daemon()

    def start_daemon(self):
        """Wait for the daemon by asking for its health, as a user would."""
        with open(self.path("log"), "ab") as log:
            self.daemon = subprocess.Popen(
                [f"{BIN}/moed", "--model", f"{DATA}/tiny-moe-q4_k_m.gguf", "--kv-blocks", "512"],
                stdin=subprocess.DEVNULL, stderr=log, env=self.environment())
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            self.assertIsNone(self.daemon.poll(), self.read("log"))
            done = subprocess.run([f"{BIN}/moed-cli", "health", "--timeout", "500"], env=self.environment(),
                                  capture_output=True, check=False)
            if done.returncode == 0:
                return
        self.fail("the daemon is not ready")

    def kill(self):
        if self.daemon.poll() is None:
            self.daemon.kill()
            self.daemon.wait()
        elif self.daemon.returncode not in (0, -signal.SIGKILL):
            print(f"the daemon ended with {self.daemon.returncode}:", self.read("log"), file=sys.stderr)

    def stop(self):
        self.daemon.send_signal(signal.SIGTERM)
        self.assertEqual(self.daemon.wait(timeout=PATIENCE), 0, self.read("log"))

    def questions(self, n):
        with open(QUESTIONS, encoding="utf-8") as f:
            return f.read().splitlines()[:n]

    def batch_lines(self, questions):
        return "".join(json.dumps({
            "custom_id": f"q{i}", "method": "POST", "url": "/v1/chat/completions",
            "body": {"model": "tiny", "messages": [{"role": "user", "content": q}], "temperature": 0,
                     "max_tokens": 40}}) + "\n" for i, q in enumerate(questions))

    def answers(self):
        out = {}
        for line in self.read("out").splitlines():
            result = json.loads(line)
            self.assertIsNone(result["error"])
            self.assertNotIn(result["custom_id"], out)
            out[result["custom_id"]] = result["response"]["body"]["choices"][0]["message"]["content"]
        return out

    def test_tokens(self):
        """The reference tokenizer's ids of a rendered chat, and there and back."""
        with open(f"{DATA}/tiny-moe-q4_k_m.json", encoding="utf-8") as f:
            prompts = {p["name"]: p for p in json.load(f)["prompts"]}
        ids = self.cli("tokenize", "--chat", 'What does "kernel" mean?').split()
        self.assertEqual([int(i) for i in ids], prompts["ask-kernel"]["ids"])
        text = prompts["text-1"]["text"]
        ids = self.cli("tokenize", stdin=text).split()
        self.assertEqual([int(i) for i in ids], prompts["text-1"]["ids"])
        self.assertEqual(self.cli("detokenize", "-f", "-", stdin=" ".join(ids)), text + "\n")
        self.stop()
        self.cli("health", "--timeout", "200", code=3)

    def test_same_answers_every_way(self):
        """A question has one answer: alone, in a batch, among 16 streams."""
        questions = self.questions(16)
        self.write("in", self.batch_lines(questions))
        self.cli("batch", "-i", self.path("in"), "-o", self.path("out"))
        answers = self.answers()
        self.assertEqual(len(answers), 16)
        for i in (0, 7, 15):
            self.assertEqual(self.cli("chat", "-p", questions[i], "--max-tokens", "40"), answers[f"q{i}"] + "\n")
        path = self.write("questions", "\n".join(questions))
        shown = self.load("--prompts", path, "-r", "16", "-c", "16", "--max-tokens", "40", "--show-answers",
                          "--verify", "4", "--json", self.path("json"))
        for i, question in enumerate(questions):
            self.assertIn(f"{i + 1:3}  {question}  {answers[f'q{i}']}".replace("\n", " ") + "\n", shown)
        report = json.loads(self.read("json"))
        self.assertEqual((report["ok"], report["verified_same"]), (16, 4))
        self.assertLess(report["expert_reads"], report["expert_reads_ungrouped"])
        self.assertTrue(0 < report["kv_blocks_peak"] <= report["kv_blocks_total"] == 512)
        stats = json.loads(self.cli("stats", "--json"))
        self.assertEqual(stats["requests_accepted"], 16 + 3 + 16 + 4)
        self.assertEqual(stats["kv_blocks_held"], 0)
        self.stop()

    def test_batch_outlives_the_daemon(self):
        """The daemon is killed in the middle; a new one answers the rest, and the same."""
        questions = self.questions(32)
        self.write("in", self.batch_lines(questions))
        p = self.start("moed-cli", "batch", "-i", self.path("in"), "-o", self.path("out"), "-c", "4")
        while not os.path.exists(self.path("out")) or os.path.getsize(self.path("out")) < 1000:
            self.assertIsNone(p.poll())
            time.sleep(0.001)
        self.daemon.kill()
        self.daemon.wait()
        _, err = p.communicate(timeout=PATIENCE)
        self.assertEqual(p.returncode, 3, err)
        first = self.answers()
        self.assertLess(len(first), 32)
        self.start_daemon()
        self.cli("batch", "-i", self.path("in"), "-o", self.path("out"))
        answers = self.answers()
        self.assertEqual(len(answers), 32)
        self.assertTrue(set(first.items()) <= set(answers.items()))
        os.remove(self.path("out"))
        self.cli("batch", "-i", self.path("in"), "-o", self.path("out"))
        self.assertEqual(self.answers(), answers)
        self.stop()


if __name__ == "__main__":
    unittest.main(verbosity=2)
