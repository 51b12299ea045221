"""Hooks: that observers are called, checked when given, and can disturb nothing; and the observers that show progress."""

import inspect
import io
import logging
import sys

import pytest

import ckptkit
from ckptkit import discovery, errors, hookspecs, progress
from ckptkit.registry import Owner, Plugin, Registry
from ckptkit.reports import ProgressEvent, RestoreReport, SaveReport

SAVED = SaveReport(path="/x", byte_count=8, leaf_count=1, blocking_secs=0.1, total_secs=0.2)
RESTORED = RestoreReport(path="/x", byte_count=8, leaf_count=1, verified=True, total_secs=0.2)
HALF = ProgressEvent(operation="save", path="/x", done_byte_count=4_000_000, total_byte_count=8_000_000)
DONE = ProgressEvent(operation="save", path="/x", done_byte_count=8_000_000, total_byte_count=8_000_000, finished=True)


class Recorder:
    def __init__(self):
        self.seen = []

    @ckptkit.hookimpl
    def ckptkit_save_committed(self, report):
        self.seen.append(report)

    @ckptkit.hookimpl
    def ckptkit_restored(self, report):
        self.seen.append(report)

    @ckptkit.hookimpl
    def ckptkit_progress(self, event):
        self.seen.append(event)


class Raising:
    def __init__(self, error):
        self.error = error
        self.calls = 0

    @ckptkit.hookimpl
    def ckptkit_save_committed(self, report):
        self.calls += 1
        raise self.error

    @ckptkit.hookimpl
    def ckptkit_progress(self, event):
        self.calls += 1
        raise self.error


def notifier(*observers):
    return discovery.notifier(Registry(), observers)


def test_every_hook_has_a_docstring_and_is_public():
    hooks = [name for name in vars(hookspecs) if name.startswith("ckptkit_")]
    assert sorted(hooks) == [name for name in hookspecs.__all__ if name.startswith("ckptkit_")]
    assert [name for name in hooks if not inspect.getdoc(getattr(hookspecs, name))] == []


def test_an_observer_is_told_everything():
    recorder = Recorder()
    told = notifier(recorder)
    told.progress(HALF)
    told.save_committed(SAVED)
    told.restored(RESTORED)
    assert recorder.seen == [HALF, SAVED, RESTORED]


def test_a_loaded_plugin_is_told_too():
    registry, recorder = Registry(), Recorder()
    registry.plugins.append(Plugin(Owner("acme", "acme", "1.0", "acme"), recorder, discovery._host(recorder, "acme")))
    discovery.notifier(registry).restored(RESTORED)
    assert recorder.seen == [RESTORED]


@pytest.mark.parametrize("error", [ValueError("boom"), SystemExit(3)])
def test_an_observer_that_raises_is_logged_and_the_next_is_told(caplog, error):
    recorder = Recorder()
    notifier(Raising(error), recorder).save_committed(SAVED)
    assert recorder.seen == [SAVED]
    (record,) = caplog.records
    assert record.message == "observer Raising raised in ckptkit_save_committed; the checkpoint is not affected."
    assert record.exc_info[1] is error


def test_one_whose_progress_raises_is_told_no_more_of_it(caplog):
    raising, recorder = Raising(ValueError("boom")), Recorder()
    told = notifier(raising, recorder)
    told.progress(HALF)
    told.progress(DONE)
    assert raising.calls == 1
    assert len(caplog.records) == 1
    assert recorder.seen == [HALF, DONE]


def test_an_interrupt_goes_through():
    with pytest.raises(KeyboardInterrupt):
        notifier(Raising(KeyboardInterrupt())).save_committed(SAVED)


def test_an_observer_may_take_no_arguments():
    class Counting:
        calls = 0

        @ckptkit.hookimpl
        def ckptkit_restored(self):
            Counting.calls += 1

    notifier(Counting()).restored(RESTORED)
    assert Counting.calls == 1


class Unmarked:
    def ckptkit_restored(self, report):
        pass


class Misspelt:
    @ckptkit.hookimpl
    def ckptkit_restore(self, report):
        pass


class Misnamed:
    @ckptkit.hookimpl
    def ckptkit_restored(self, result):
        pass


@pytest.mark.parametrize(
    ("observer", "message"),
    [
        (object(), r"has no hook\. Mark its hooks with @ckptkit\.hookimpl; they are .*ckptkit_restored"),
        (Unmarked(), r"observer Unmarked: ckptkit_restored of .* is not marked as a hook"),
        (Misspelt(), r"(?s)observer Misspelt: unknown hook 'ckptkit_restore'.*they are .*ckptkit_restored"),
        (Misnamed(), r"(?s)observer Misnamed.*ckptkit_restored.*'result'.*ckptkit_restored\(report"),
        (Recorder, r"is a class; expected an instance: Recorder\(\)"),
        (print, "has no hook"),
    ],
)
def test_an_observer_that_could_never_be_called_is_refused(observer, message):
    with pytest.raises(errors.ArgsError, match=message):
        notifier(observer)


def test_a_hook_of_a_later_version_can_be_optional():
    class Ahead:
        @ckptkit.hookimpl(optionalhook=True)
        def ckptkit_step_deleted(self, step):
            pass

    notifier(Ahead()).restored(RESTORED)


def test_making_a_notifier_loads_no_plugin():
    def load(registry):
        raise AssertionError

    discovery.notifier(Registry(load=load), [Recorder()])


# Progress


def test_progress_goes_to_a_log(caplog):
    with caplog.at_level(logging.INFO):
        told = notifier(progress.LogProgress(logging.getLogger("training")))
        told.progress(HALF)
        told.progress(DONE)
    assert [(record.name, record.message) for record in caplog.records] == [
        ("training", "save /x: 4.0 of 8.0 MB"),
        ("training", "save /x: 8.0 of 8.0 MB, finished"),
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "force", "shown"), [(Terminal, False, True), (io.StringIO, False, False), (io.StringIO, True, True)]
)
def test_a_bar_is_shown_on_a_terminal_or_when_forced(monkeypatch, stream, force, shown):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", stream())
    bar = progress.TqdmProgress(force=force)
    told = notifier(bar)
    told.progress(HALF)
    told.progress(DONE)
    text = sys.stderr.getvalue()
    assert ("save /x: 100%" in text) is shown
    assert bool(text) is shown


def test_each_operation_has_a_bar_until_it_is_finished(monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    bar = progress.TqdmProgress()
    told = notifier(bar)
    told.progress(HALF)
    told.progress(ProgressEvent(operation="restore", path="/x", done_byte_count=0, total_byte_count=0))
    told.progress(DONE)
    assert list(bar._bars) == [("restore", "/x")]
    told.progress(ProgressEvent(operation="restore", path="/x", done_byte_count=0, total_byte_count=0, finished=True))
    assert bar._bars == {}


def test_without_tqdm_the_bar_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(errors.ArgsError, match="pip install tqdm"):
        progress.TqdmProgress()
