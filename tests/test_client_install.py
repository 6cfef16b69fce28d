"""The installed library: a program of ten lines compiles, links and runs with what pkg-config says."""

import os
import subprocess
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from fake import PATIENCE, Case

PROGRAM = r"""
#include <stdio.h>
#include <clients/lib/client.h>
int main(void) {
    struct client_options o = {.name = "ten lines"};
    struct error e;
    struct client *c;
    if (client_open(&o, &e, &c) != ST_OK) return fprintf(stderr, "%s\n", e.text), 1;
    printf("%.*s\n", (int)client_welcome(c)->model.n, (const char *)client_welcome(c)->model.p);
    client_close(c);
}
"""


class Install(Case):
    def command(self, *words, **environment):
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=False,
                              env={**self.environment(), **environment})
        self.assertEqual(done.returncode, 0, f"{words}: {done.stdout}{done.stderr}")
        return done.stdout

    def test_ten_lines(self):
        self.serve()
        self.command(os.environ["CMAKE"], "--install", os.environ["MOED_BUILD"], "--component", "client",
                     "--prefix", self.path("first"))
        os.rename(self.path("first"), self.path("moved"))  # the tree may be moved
        found = [root for root, _, files in os.walk(self.path("moved")) if "moed-client.pc" in files]
        self.assertEqual(len(found), 1)
        flags = self.command("pkg-config", "--cflags", "--libs", "moed-client", PKG_CONFIG_PATH=found[0])
        self.assertNotIn(os.environ["MOED_BUILD"], flags)
        self.write("ten.c", PROGRAM)
        self.command(os.environ["CC"], "-std=c11", "-Wall", "-Wextra", "-Werror",
                     *os.environ.get("CFLAGS", "").split(), self.path("ten.c"), "-o", self.path("ten"),
                     *flags.split())
        self.assertEqual(self.command(self.path("ten")), "fake\n")
        version = self.command("pkg-config", "--modversion", "moed-client", PKG_CONFIG_PATH=found[0])
        self.assertRegex(version, r"^\d+\.\d+\.\d+\n$")


if __name__ == "__main__":
    unittest.main(verbosity=2)
