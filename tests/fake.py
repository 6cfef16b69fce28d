"""The fake server of fake_server.h as a process, and programs run against it."""

import json
import os
import shutil
import subprocess
import tempfile
import unittest

BIN = os.environ["TEST_BIN"]
PATIENCE = 300  # seconds, for what must come: a test that waits this long has failed


class Fake:
    """moed-fake with the given options; stop() returns its counts."""

    def __init__(self, directory, **options):
        self.endpoint = f"ipc://{directory}/fake.sock"
        words = [f"{key}={value}" for key, value in options.items()]
        self.process = subprocess.Popen(
            [f"{BIN}/moed-fake", f"endpoint={self.endpoint}", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        if line != "ready\n":
            raise RuntimeError(f"moed-fake said {line!r}")

    def stop(self):
        out, _ = self.process.communicate("", timeout=PATIENCE)
        if self.process.returncode != 0:
            raise RuntimeError(f"moed-fake ended with {self.process.returncode}")
        return json.loads(out)

    def kill(self):
        self.process.kill()
        self.process.communicate()


class Case(unittest.TestCase):
    """A test with a directory of its own, and servers that are gone when it ends."""

    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="moed-test-")
        self.addCleanup(shutil.rmtree, self.dir)
        self.fake = None

    def serve(self, **options):
        self.fake = Fake(self.dir, **options)
        self.addCleanup(self.fake.kill)
        return self.fake

    def path(self, name):
        return os.path.join(self.dir, name)

    def write(self, name, text):
        with open(self.path(name), "w", encoding="utf-8") as f:
            f.write(text)
        return self.path(name)

    def read(self, name):
        with open(self.path(name), encoding="utf-8") as f:
            return f.read()

    def environment(self):
        endpoint = self.fake.endpoint if self.fake else f"ipc://{self.dir}/nobody.sock"
        return {**os.environ, "MOED_ENDPOINT": endpoint}

    def start(self, program, *args, **keywords):
        keywords.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.Popen([f"{BIN}/{program}", *args], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, env=self.environment(), text=True, **keywords)

    def run_program(self, program, *args, code=0, stdin=""):
        """Run to the end; returns stdout, keeps stderr in self.stderr."""
        done = subprocess.run([f"{BIN}/{program}", *args], input=stdin, capture_output=True,
                              env=self.environment(), text=True, timeout=PATIENCE, check=False)
        self.stderr = done.stderr
        self.assertEqual(done.returncode, code, f"{args}: {done.stdout}{done.stderr}")
        return done.stdout

    def cli(self, *args, **keywords):
        return self.run_program("moed-cli", *args, **keywords)

    def load(self, *args, **keywords):
        return self.run_program("moed-load", *args, **keywords)
