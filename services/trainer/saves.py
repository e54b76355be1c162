"""What an operation leaves outside of its run: policies, checkpoints, files to download.

Each can be done again at any step without harm. Blobs have their content in their names and come first, then the record
that names them, written once or in the order of the operations, then the answer. No lock is held and the engine is
asked for the weights alone, so other runs go on while files are written.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping

from services.trainer import encryption
from services.trainer.answers import result_of
from services.trainer.engine_thread import EngineThread
from services.trainer.held import HeldRun
from shared import topology
from shared.checkpoints import Checkpoints, files_of
from shared.contracts.blobs import BlobRef
from shared.contracts.checkpoints import CheckpointKey, CheckpointKind, CheckpointRecord, SaveSpec
from shared.contracts.policies import PolicyPublished, PolicyRecord, PolicyRef
from shared.contracts.training import Operation, OperationResult, SaveExternal, SavePolicy, SaveState
from shared.errors import TemporaryError
from shared.node import Node


class Saves:
    """Writes what runs save."""

    def __init__(self, node: Node, engine: EngineThread, held: Mapping[str, HeldRun]) -> None:
        self._node = node
        self._engine = engine
        self._held = held
        self._policies = node.bus.table(topology.POLICIES)
        self._inflight = node.bus.table(topology.INFLIGHT)
        self._checkpoints = Checkpoints(node.bus, node.blobs)

    async def policy(self, operation: SavePolicy, held: HeldRun) -> OperationResult:
        """Publish the weights as a policy, and record it as was asked for."""
        spec = operation.checkpoint
        if spec is not None:
            await self._done_before(operation, "sampler", spec)
        record = await self._publish_policy(operation, held)
        if record is None:  # done before, and deleted since
            return result_of(operation)
        recorded = None
        if spec is not None:
            files = files_of(record)
            recorded = await self._record(operation, held, "sampler", spec, files=files, policy=record.policy)
        if operation.inflight:
            await self._sample_in_flight(record.policy, held)
        return result_of(operation, policy=record, recorded=recorded)

    async def state(self, operation: SaveState, held: HeldRun) -> OperationResult:
        """Write weights and optimizer."""
        spec = operation.checkpoint
        if spec is not None and (done := await self._done_before(operation, "training", spec)) is not None:
            return result_of(operation, checkpoint=done.state, recorded=done)
        state = await self._engine.call(self._engine.engine.snapshot, operation.run)
        # A recorded one is named by its seq, so that nothing else ever refers to its blob.
        name = topology.token(operation.name) if spec is None else str(operation.seq)
        ref = await self._node.blobs.put(f"{_folder(operation)}/{name}-{_digest(state)}.safetensors", state)
        recorded = None
        if spec is not None:
            recorded = await self._record(operation, held, "training", spec, state=ref)
        return result_of(operation, checkpoint=ref, recorded=recorded)

    async def external(self, operation: SaveExternal, held: HeldRun) -> OperationResult:
        """Write the adapter's files, encrypted if there are recipients."""
        recipients = encryption.recipients_of(operation.recipients)
        if (done := await self._done_before(operation, "external", operation.checkpoint)) is not None:
            return result_of(operation, recorded=done)
        files = await self._engine.call(self._engine.engine.export_adapter, operation.run)
        if recipients:
            files = {
                name + encryption.SUFFIX: await asyncio.to_thread(encryption.encrypted, content, recipients)
                for name, content in files.items()
            }
        # Encrypting twice gives other bytes: the name must hold those that are written.
        folder = f"{_folder(operation)}/{operation.seq}-external-{_digest(*files.values())}"
        refs = {name: await self._node.blobs.put(f"{folder}/{name}", content) for name, content in files.items()}
        recorded = await self._record(
            operation, held, "external", operation.checkpoint, files=refs, encrypted=bool(recipients)
        )
        return result_of(operation, recorded=recorded)

    async def told_before(self, operation: Operation) -> OperationResult | None:
        """What an operation gave that was done before, as far as that was written down; None: it is no save."""
        policy = recorded = None
        if isinstance(operation, SavePolicy):
            entry = await self._policies.get((operation.run, str(operation.version)))
            policy = entry.value if entry else None
            recorded = await self._recorded(operation, "sampler", operation.checkpoint)
        elif isinstance(operation, SaveState):
            recorded = await self._recorded(operation, "training", operation.checkpoint)
        elif isinstance(operation, SaveExternal):
            recorded = await self._recorded(operation, "external", operation.checkpoint)
        else:
            return None
        return result_of(operation, policy=policy, checkpoint=recorded.state if recorded else None, recorded=recorded)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    async def _done_before(self, operation: Operation, kind: CheckpointKind, spec: SaveSpec) -> CheckpointRecord | None:
        """Also before anything is written: raise `UserError` if the name is taken."""
        key = CheckpointKey(run=operation.run, kind=kind, name=spec.name)
        return await self._checkpoints.done_before(key, operation.seq, overwrite=spec.overwrite)

    async def _recorded(
        self, operation: Operation, kind: CheckpointKind, spec: SaveSpec | None
    ) -> CheckpointRecord | None:
        if spec is None:
            return None
        entry = await self._checkpoints.find(CheckpointKey(run=operation.run, kind=kind, name=spec.name))
        return entry.value if entry is not None and entry.value.seq == operation.seq else None

    async def _record(
        self,
        operation: Operation,
        held: HeldRun,
        kind: CheckpointKind,
        spec: SaveSpec,
        *,
        state: BlobRef | None = None,
        policy: PolicyRef | None = None,
        files: Mapping[str, BlobRef] | None = None,
        encrypted: bool = False,
    ) -> CheckpointRecord:
        self._check_ours(held)
        refs = [*([state] if state is not None else []), *(files or {}).values()]
        now = time.time()
        record = CheckpointRecord(
            key=CheckpointKey(run=operation.run, kind=kind, name=spec.name),
            base_model=held.record.base_model,
            lora=held.record.lora,
            owner=held.record.owner,
            seq=operation.seq,
            created=now,
            size=sum(ref.size for ref in refs),
            state=state,
            policy=policy,
            files=dict(files or {}),
            encrypted=encrypted,
            expires=None if spec.ttl_seconds is None else now + spec.ttl_seconds,
            user_metadata=spec.user_metadata,
        )
        return await self._checkpoints.record(record, overwrite=spec.overwrite)

    # -- policies ------------------------------------------------------------------------------------------------

    async def _publish_policy(self, operation: SavePolicy, held: HeldRun) -> PolicyRecord | None:
        key = (operation.run, str(operation.version))
        ref = PolicyRef(run=operation.run, version=operation.version)
        if (entry := await self._policies.get(key)) is not None:
            record = entry.value  # done before the trainer was killed: a policy is written once
        elif await self._policies.was_deleted(key):
            return None  # done, and not needed any more: a replay does not bring it back
        else:
            record = await self._write_policy(ref, held)
            self._check_ours(held)
            if await self._policies.create(key, record) is None:
                raise TemporaryError(f"policy {ref} was recorded by another trainer meanwhile")
        await self._node.bus.publish(
            topology.POLICIES_PUBLISHED,
            PolicyPublished(record=record, seq=operation.seq),
            msg_id=f"policy/{ref}",
            run=operation.run,
        )
        return record

    async def _write_policy(self, ref: PolicyRef, held: HeldRun) -> PolicyRecord:
        files = await self._engine.call(self._engine.engine.export_adapter, ref.run)
        weights = files["adapter_model.safetensors"]
        # The content is in the name: a replay that ends in another last bit does not collide with an earlier write.
        folder = f"policies/{topology.token(ref.run)}/{ref.version}-{_digest(weights)}"
        config_ref, weights_ref = await asyncio.gather(
            self._node.blobs.put(f"{folder}/adapter_config.json", files["adapter_config.json"]),
            self._node.blobs.put(f"{folder}/adapter_model.safetensors", weights),
        )
        return PolicyRecord(
            policy=ref,
            base_model=held.record.base_model,
            lora=held.record.lora,
            config=config_ref,
            weights=weights_ref,
            owner=held.record.owner,
        )

    async def _sample_in_flight(self, policy: PolicyRef, held: HeldRun) -> None:
        """Make it the run's policy for sampling in flight, unless a newer one is."""
        while True:
            self._check_ours(held)
            entry = await self._inflight.get(policy.run)
            if entry is None:
                written = await self._inflight.create(policy.run, policy)
            elif entry.value.version >= policy.version:
                return
            else:
                written = await self._inflight.update(policy.run, policy, entry.revision)
            if written is not None:
                return

    def _check_ours(self, held: HeldRun) -> None:
        """Raise `TemporaryError` if the lease is known to be lost. The order of records takes care of the rest."""
        if self._held.get(held.name) is not held:
            raise TemporaryError(f"run {held.name} is no longer ours")


def _folder(operation: Operation) -> str:
    return f"checkpoints/{topology.token(operation.run)}"


def _digest(*contents: bytes) -> str:
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return digest.hexdigest()[:12]
