"""Signals at the moments at which Python swallows exceptions, or at which nothing is left to stop."""

import subprocess
import sys
import textwrap

import pytest

PRELUDE = """import signal, time
from regraft.cli import main
from regraft.core.errors import InputError
from regraft.core.interrupts import unbroken
"""


def script(body):
    text = PRELUDE + textwrap.dedent(body)
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_in_a_finaliser_still_ends_the_command(name):
    ran = script(f"""
        class Slow:
            def __del__(self):
                signal.raise_signal(signal.{name})

        def command(**options):
            slow = Slow()
            del slow
            for _ in range(1000):
                time.sleep(0.01)

        main.app = command
        main.run(["apply"])
    """)
    assert ran.returncode == 130
    assert ran.stderr.startswith("interrupted; ")
    assert "Traceback" not in ran.stderr


def test_once_the_result_is_known_a_signal_changes_nothing():
    ran = script("""
        import atexit
        atexit.register(signal.raise_signal, signal.SIGINT)
        main.app = lambda **options: 3
        main.run(["apply"])
    """)
    assert (ran.returncode, ran.stderr) == (3, "")


def test_the_second_signal_ends_the_process_at_once():
    ran = script("""
        def command(**options):
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGTERM)

        main.app = command
        main.run(["apply"])
    """)
    assert ran.returncode == -15
    assert ran.stderr == ""


def test_other_faults_in_finalisers_are_reported_as_ever():
    ran = script("""
        class Broken:
            def __del__(self):
                raise ValueError("as ever")

        def command(**options):
            broken = Broken()
            del broken
            return 0

        main.app = command
        main.run(["apply"])
    """)
    assert ran.returncode == 0
    assert "ValueError: as ever" in ran.stderr


def test_what_clears_away_is_done_before_a_signal_counts():
    ran = script("""
        def command(**options):
            with unbroken():
                with unbroken():
                    signal.raise_signal(signal.SIGTERM)
                print("cleared")
            print("never")

        main.app = command
        main.run(["apply"])
    """)
    assert (ran.returncode, ran.stdout) == (130, "cleared\n")
    assert ran.stderr.startswith("interrupted; ")


def test_an_error_is_told_though_a_signal_comes_while_it_clears_away():
    ran = script("""
        def command(**options):
            try:
                raise InputError("cut short", where="model.safetensors", remedy="fetch it again")
            finally:
                with unbroken():
                    signal.raise_signal(signal.SIGTERM)

        main.app = command
        main.run(["apply"])
    """)
    assert ran.returncode == 3
    assert ran.stderr.startswith("error: model.safetensors: cut short")


def test_an_error_is_told_though_a_signal_comes_while_it_is_told():
    ran = script("""
        def command(**options):
            raise InputError("cut short", where="model.safetensors", remedy="fetch it again")

        tell = main.fail
        main.fail = lambda *given, **options: signal.raise_signal(signal.SIGTERM) or tell(*given, **options)
        main.app = command
        main.run(["apply"])
    """)
    assert ran.returncode == 3
    assert ran.stderr.startswith("error: model.safetensors: cut short")


def test_whoever_deals_with_that_error_can_be_interrupted_again():
    ran = script("""
        def command(**options):
            try:
                raise InputError("cut short", where="model.safetensors", remedy="fetch it again")
            except InputError:
                with unbroken():
                    signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

        main.app = command
        main.run(["apply"])
    """)
    assert ran.returncode == 130
    assert ran.stderr.startswith("interrupted; ")


def test_a_second_signal_breaks_off_even_what_clears_away():
    ran = script("""
        def command(**options):
            with unbroken():
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

        main.app = command
        main.run(["apply"])
    """)
    assert ran.returncode == -2
