"""The node: receiver, completion, workers, delivery and page wired together; starts and stops as one."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType

from ctflow.core.atomic import make_output_folder
from ctflow.core.errors import DestinationDown, SettingsInvalid
from ctflow.core.model import RESEARCH_ONLY
from ctflow.node.certificates import CertificateWatch
from ctflow.node.deliver.choose import choose_destinations
from ctflow.node.deliver.folder import FolderTarget
from ctflow.node.deliver.reports import ReportThread
from ctflow.node.deliver.send import COPY, CommitmentPolicy, DeliveryThread, Target
from ctflow.node.deliver.storage import StorageTarget
from ctflow.node.deliver.targets import target_of
from ctflow.node.deliver.webhook import WebhookTarget
from ctflow.node.dicomweb.stow import StowIntake
from ctflow.node.journal.clock import move_after_start
from ctflow.node.journal.commitments import Commitments, ReportRecord
from ctflow.node.journal.journal import JOURNAL_FILE, Journal
from ctflow.node.journal.records import WorkerResult
from ctflow.node.journal.runs import QueueRules
from ctflow.node.keeping.locks import may_remove, only_one
from ctflow.node.keeping.pruning import RetentionThread
from ctflow.node.keeping.retention import remove_results
from ctflow.node.log import POSITION_FILE, AuditTrail, told_forever
from ctflow.node.metrics import Metrics
from ctflow.node.receive.commitment import CommitmentService
from ctflow.node.receive.complete import Completer
from ctflow.node.receive.inbox import Inbox
from ctflow.node.receive.intake import LEFT_OUT, Intake, IntakeLimits
from ctflow.node.receive.pending import Security
from ctflow.node.receive.receiver import STORED_CLASSES, Receiver, Reception
from ctflow.node.settings.groups import Backoff
from ctflow.node.settings.service import (
    ServiceSettings,
    certificate_refusal,
    is_peer,
    may_be_plain,
    report_target,
    same_uid_of,
)
from ctflow.node.tls import TlsContext, context_to_peer, contexts_of
from ctflow.node.web.pages import NodeView
from ctflow.node.web.server import serving
from ctflow.node.work.messages import ModelChoice, NotReady, Ready, Setup
from ctflow.node.work.pool import Places, WorkerPool
from ctflow.node.work.supervisor import FIRST_WAIT_S, MOST_ATTEMPTS
from ctflow.settings.run import Settings

STOP_GRACE_S = 20.0  # a container gets 30 s, and an unfinished case waits in the journal
_RECEIVE_GRACE_S = 5.0

log = logging.getLogger(__name__)


class Node:
    """A DICOM node of one data folder.

    Args:
        settings: The site's.
        run: Settings of each run (those of `ctflow run`); the engine and device are the site's.

    Raises:
        SettingsInvalid: An address cannot be listened on, or another node uses the data folder.
        OutputError: The data folder cannot be written.
        BackendUnavailable: A package of the extra `serve` is missing.
    """

    def __init__(self, settings: ServiceSettings, run: Settings) -> None:
        self.settings = settings
        self._stack = ExitStack()
        with ExitStack() as stack:
            self._build(stack, run)
            self._stack = stack.pop_all()

    def _build(self, stack: ExitStack, run: Settings) -> None:
        settings, data = self.settings, self.settings.data
        make_output_folder(data, "the data folder", option="--data (or the key data)")
        stack.enter_context(only_one(data))
        self.places = Places.below(data)
        make_output_folder(self.places.results, "the folder of results in the data folder")
        self.journal = Journal(data / JOURNAL_FILE)
        stack.callback(self.journal.close)
        self._clean()
        self.metrics = Metrics(self.journal, data)
        changed = threading.Event()
        self.journal.on_change(changed.set)
        self._audit = stack.enter_context(told_forever(AuditTrail(self.journal, data / POSITION_FILE), changed))
        inbox = Inbox(self.places.inbox, settings.limits.free_disk)
        self._inbox = inbox
        models = tuple(
            ModelChoice(each.name, each.bundle or settings.bundle, settings.run_of(each)) for each in settings.models
        )
        level = logging.getLogger().getEffectiveLevel()
        setup = Setup(settings.bundle, run, settings.rules, level, models, settings.engines_open)
        queue = QueueRules(
            urgent_in_a_row=settings.queue.urgent_in_a_row, routine_waits_s=settings.queue.routine_waits_s
        )
        self.pool = WorkerPool(
            self.journal, self.places, setup, settings.devices, self._deliveries, self.metrics, queue
        )
        tls = contexts_of(settings)
        self.certificates = CertificateWatch(
            tuple(tls.values()), lambda kind, text, peer: self.journal.event(kind, text, peer=peer)
        )
        self.metrics.expiries(self.certificates.expiries)
        service = self._build_delivery(tls)
        self.retention = RetentionThread(self.journal, data, settings.retention)
        by_study = settings.complete_by == "study"
        quiet_s = settings.study_quiet_period_s if by_study else settings.quiet_period_s
        self.completer = Completer(self.journal, quiet_s, by_study=by_study)
        limits = IntakeLimits(settings.limits.instances, settings.limits.series, settings.web.patient_data, by_study)
        self.intake = Intake(
            limits, inbox, self.journal, self.metrics,
            lambda caller: same_uid_of(settings, caller.ae_title, caller.address),
        )  # fmt: skip
        stack.callback(self.intake.comparer.close)
        self.receiver = Receiver(
            _reception(settings, tls.get("tls"), self.certificates.rejected), self.intake, self.metrics, service
        )
        self._page_tls = tls.get("web.tls")

    def _build_delivery(self, tls: Mapping[str, TlsContext]) -> CommitmentService:
        """Delivery threads, and storage commitment in both directions."""
        settings = self.settings
        commitments = Commitments(self.journal, self.places.inbox)
        service = CommitmentService(commitments, (*STORED_CLASSES, *LEFT_OUT))
        policies = {
            each.name: CommitmentPolicy(commitments, each.commitment_timeout_s)
            for each in settings.destinations
            if each.commitment != "none"
        }
        self.delivery_threads = [
            DeliveryThread(name, target, self.journal, self.places.results, backoff, self.metrics, policies.get(name))
            for name, target, backoff in _targets(settings, tls, service)
        ]
        self._reports = ReportThread(self.journal, commitments, partial(_report_target, settings), Backoff())
        return service

    def _clean(self) -> None:
        """Clean up after an end at any moment, without touching acknowledged files."""
        self.journal.change(partial(move_after_start, longest_s=_longest_wait_s(self.settings)))
        waiting = self.journal.recover()
        with may_remove(self.settings.data) as allowed:
            removed = Inbox(self.places.inbox, 0).sweep(self.journal.files()) if allowed else 0
            removed += remove_results(self.journal, self.places.results) if allowed else 0
        for folder in self.places.results.glob("*/.*"):  # a result that was being written
            shutil.rmtree(folder, ignore_errors=True)
        if waiting or removed:
            log.warning(
                "after a crash: %d series run again, %d files without an acknowledgement removed", len(waiting), removed
            )

    def _deliveries(self, answer: WorkerResult) -> Sequence[tuple[str, str]]:
        """Destinations and files: every volume's SEG first, as the reports refer to them."""
        choice = choose_destinations(self.settings, self.places.results, answer)
        if choice.text:
            self.journal.event("destinations", choice.text, key=Path(answer.folder).parts[0])
        return choice.deliveries

    def __enter__(self) -> Node:
        with ExitStack() as undo:
            undo.callback(self._stack.close)
            self.pool.start()
            self._stack.callback(self.pool.stop, STOP_GRACE_S)
            for delivery_thread in self.delivery_threads:
                delivery_thread.start()
                self._stack.callback(delivery_thread.stop)
            self._reports.start()
            self._stack.callback(self._reports.stop)
            self.certificates.start()
            self._stack.callback(self.certificates.stop)
            self.retention.start()
            self._stack.callback(self.retention.stop)
            self.completer.start()
            self._stack.callback(self.completer.stop)
            self.receiver.start()
            self._stack.callback(self.receiver.stop, _RECEIVE_GRACE_S)
            if self.settings.web.enabled:
                shown = NodeView(
                    self.settings, self.journal, self.places.results, self.metrics,
                    self.problems, self.remarks, self.demonstration, stow=self._stow(),
                    tls=self._page_tls,
                )  # fmt: skip
                self.web_port = self._stack.enter_context(serving(shown))
            undo.pop_all()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._stack.close()
        log.info("stopped")

    def _stow(self) -> StowIntake | None:
        """Where instances that come by STOW-RS go; they share limits with those of C-STORE."""
        limits = self.settings.limits
        if not self.settings.web.stow:
            return None
        return StowIntake(
            take=self.intake.take,
            refused=lambda what: self.metrics.refused(f"stow-{what}"),
            shared=self.receiver.shared,
            most_bytes=limits.request,
            most_parts=limits.instances,
        )

    def problems(self) -> list[str]:
        """Why the node cannot receive or run now; empty while it receives, completes and has one running worker."""
        full = [] if self._inbox.has_space(0) else ["the disk is nearly full: instances are refused"]
        needed = (*self.journal.threads, *self.receiver.threads, self.completer)
        return [*_ended(needed), *full, *self.pool.problems()]

    def remarks(self) -> list[str]:
        """Faults with which the node still receives and runs: one of several workers, a delivery."""
        threads = (
            *self.pool.threads, *self.delivery_threads, self._audit, self.certificates, self.retention, self._reports,
        )  # fmt: skip
        return [*_ended(threads), *self.pool.remarks(), *self.certificates.remarks()]

    def demonstration(self) -> str | None:
        """The notice for a demonstration model; None for another, or while the model is not known yet."""
        word = self.pool.first_word
        if not isinstance(word, Ready) or not word.demonstration:
            return None
        sent = "are sent (allow_demonstration)" if self.settings.allow_demonstration else "are not sent"
        if len(word.demonstrations) > 1:
            return f"{RESEARCH_ONLY}: {', '.join(word.demonstrations)} are demonstration models. Their results {sent}."
        name = word.demonstrations[0] if word.demonstrations else word.model
        return f"{RESEARCH_ONLY}: {name} is a demonstration model. Its results {sent}."


def run_node(settings: ServiceSettings, run: Settings, stop: threading.Event) -> None:
    """Run a node until `stop` is set.

    Raises:
        CtflowError: The node cannot start, or its model cannot be opened.
    """
    with Node(settings, run) as node:
        threading.Thread(target=_stop_when_opened, args=(node, stop), daemon=True).start()
        stop.wait()
        log.info("stopping")
        word = node.pool.first_word
        if isinstance(word, NotReady):
            raise word.error


def _stop_when_opened(node: Node, stop: threading.Event) -> None:
    """End the start if the model cannot be opened, as a wrong file does."""
    node.pool.opened.wait()
    if isinstance(node.pool.first_word, NotReady):
        stop.set()


def _targets(
    settings: ServiceSettings, tls: Mapping[str, TlsContext], service: CommitmentService
) -> list[tuple[str, Target, Backoff]]:
    targets: list[tuple[str, Target, Backoff]] = [
        (
            each.name,
            target_of(settings.ae_title, each, tls.get(f"destinations[{number}].tls"), service.report),
            each.backoff,
        )
        for number, each in enumerate(settings.destinations, start=1)
    ]
    targets += [(each.name, WebhookTarget(each), each.backoff) for each in settings.webhooks]
    if settings.copy_to is not None:
        targets.append((COPY, FolderTarget(settings.copy_to), Backoff()))
    return targets


def _longest_wait_s(settings: ServiceSettings) -> float:
    """No run, object, report or webhook waits longer for its next attempt."""
    waits = [wait_s for each in settings.destinations for wait_s in (each.backoff.most_s, each.commitment_timeout_s)]
    waits += [each.backoff.most_s for each in settings.webhooks]
    return max(*waits, Backoff().most_s, FIRST_WAIT_S * 4.0**MOST_ATTEMPTS)


def _report_target(settings: ServiceSettings, report: ReportRecord) -> StorageTarget | None:
    """How to reach the peer that asked for storage commitment."""
    asked, tls = report.request, settings.tls
    peer = report_target(settings, asked.calling_ae, asked.peer)
    if peer is None or peer.port is None:
        return None
    try:
        context = context_to_peer(tls, peer.fingerprints) if asked.with_tls and tls is not None else None
    except SettingsInvalid as error:  # its files are being replaced
        raise DestinationDown(str(error), reason="tls") from error
    host = asked.peer.removeprefix("::ffff:")  # IPv4, on a port that listens for IPv6 too
    return StorageTarget(settings.ae_title, asked.calling_ae, host, peer.port, context)


def _reception(settings: ServiceSettings, tls: TlsContext | None, rejected: Callable[[str, str], None]) -> Reception:
    limits = settings.limits
    titles = {peer.ae_title or "" for peer in settings.peers} or {""}
    return Reception(
        ae_title=settings.ae_title,
        address=(settings.bind, settings.port),
        may_come=lambda host: any(is_peer(settings, title, host) for title in titles),
        is_peer=lambda title, host: is_peer(settings, title, host),
        associations=limits.associations,
        most_pdu=limits.pdu,
        idle_s=limits.idle_s,
        security=Security(
            None if tls is None else lambda: tls.context, lambda host: may_be_plain(settings, host), rejected
        ),
        certificate_refusal=partial(certificate_refusal, settings),
    )


def _ended(threads: Sequence[threading.Thread]) -> list[str]:
    """The threads that have ended while the node runs: a bug in ctflow, which a restart clears."""
    return [f"{each.name} has ended unexpectedly: start the node again" for each in threads if not each.is_alive()]
