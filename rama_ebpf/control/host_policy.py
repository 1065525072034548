"""Which policy belongs to this host when a server starts: that of the pins, or the one kept on disk."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Final

from ..core.errors import RamaError
from ..kernel.gate_maps import GateMaps
from ..kernel.gate_state import LAST_REVISION
from ..kernel.instance import Instance
from ..policy.image import PolicyImage
from ..policy.journal import Journal
from ..policy.kept import KeptPolicy
from ..policy.kernel_store import KernelStore
from ..policy.rule import PolicyError
from ..policy.store import PolicyStore

__all__ = ["GateUnavailable", "HostPolicy"]

log = logging.getLogger("rama_ebpf")

_WRITTEN: Final = "another program has written into the record of the policy"


class GateUnavailable(RamaError):
    """The gate cannot run in the kernel, and the operator demanded it; or not with the policy that belongs to it."""

    kind = "gate"


class HostPolicy:
    """Fills maps that a start makes (:class:`~rama_ebpf.loader.PolicyKeeper`). Of pins and disk the younger has the
    policy; where the pins are lost or cannot be used, the disk has. Nothing starts without a policy that there was."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._kept = KeptPolicy(instance.state_dir)

    def supersedes(self, pinned: GateMaps) -> bool:
        """Whether the policy on disk is younger than that of pinned maps."""
        self._say_of_another_host()
        gate, on_disk = KernelStore(self._instance, pinned).tables.gate(), 0
        revision = gate.revision
        try:
            on_disk = self._kept.revision()
            if on_disk > revision:
                self._kept.read(
                    KernelStore(self._instance, pinned).tables.rules.most
                )  # else the whole is not looked at: that takes its time
        except OSError as error:
            log.error("the policy on disk cannot be read, the pinned one stays in force: %s", error)
            return False
        where, directory = self._instance.pin_dir, self._kept.directory
        if not gate.is_sealed:
            if not on_disk:
                log.error("%s at %s, and no policy is on disk: load it anew", _WRITTEN, where)
            return on_disk > 0
        if on_disk > revision:
            text = "the policy in %s (revision %d) is younger than that of the pins at %s (%d): it comes into force"
            log.warning(text, directory, on_disk, where, revision)
        elif 0 < on_disk < revision:
            text = "the policy pinned at %s (revision %d) is younger than the one in %s (%d): it stays in force"
            log.info(text, where, revision, directory, on_disk)
        return on_disk > revision

    def fill(self, new: GateMaps, pinned: GateMaps | None, why: str) -> None:
        """Put the policy that belongs to this host into new maps. Raises :class:`GateUnavailable` or PolicyError if
        that cannot be; pins stay as they are then."""
        store = KernelStore(self._instance, new)
        if pinned is None:
            self.restore(store, why)
            return
        before = KernelStore(self._instance, pinned)
        is_sealed = before.tables.gate().is_sealed
        if is_sealed and before.pending is not None:
            raise PolicyError("a set is on trial: confirm it, roll it back, or wait until it is undone")
        revision, image = before.revision, before.image() if is_sealed else None
        try:
            kept = self._kept.read(store.tables.rules.most)
        except OSError as error:
            log.error("the policy on disk cannot be read, the pinned one stays in force: %s", error)
            kept = None
        if kept is not None and (image is None or kept.revision > image.revision):
            image = replace(kept, revision=max(kept.revision, min(revision, LAST_REVISION // 2)))
        if image is None:
            raise GateUnavailable(
                f"{_WRITTEN} at {self._instance.pin_dir}, and no other is on disk (rama-ebpf unload forgets it)"
            )
        store.put_image(image, before.ban_blocks())
        if not is_sealed:
            self._say_restored(image, _WRITTEN)

    def restore(self, store: PolicyStore, why: str = "") -> None:
        """Put the policy that is kept on disk into an empty store; ``why`` is what is wrong with the pins, if anything.
        Raises :class:`GateUnavailable`."""
        directory = self._kept.directory
        self._say_of_another_host()
        try:
            kept = self._kept.read(store.tables.rules.most if isinstance(store, KernelStore) else None)
            if kept is not None:
                kept = replace(kept, revision=max(kept.revision, self._last_revision()))
                store.put_image(kept)
        except (OSError, PolicyError) as error:
            raise GateUnavailable(
                f"the policy kept in {directory} cannot be put into force: {error} (rama-ebpf unload forgets it)"
            ) from error
        self._say_restored(kept, why)

    def _say_restored(self, kept: PolicyImage | None, why: str) -> None:
        if why:
            log.warning("pins of instance %r cannot be used and are replaced: %s", self._instance.name, why)
        if kept is not None:
            log.warning("the policy is in force again as it is kept in %s, %s", self._kept.directory, kept.described())

    def _say_of_another_host(self) -> None:
        if self._kept.is_of_another_host():
            text = "the policy in %s was written on another host (machine-id): what it says holds here, too, and ends "
            log.warning(text + "by the wall clock (rama-ebpf unload forgets it)", self._kept.directory)

    def _last_revision(self) -> int:
        """The revision of the last change that the journal knows: they never begin anew."""
        for entry in Journal(self._kept.directory / "journal").read(1):
            revision = entry.get("revision")
            if isinstance(revision, int) and 0 <= revision < LAST_REVISION:
                return revision
        return 0
