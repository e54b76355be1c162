"""Training operations, the entries of a run's log, and their results.

A run's state is a fold over its operations in `seq` order, beginning with `CreateRun` at seq 0. A refused or failed
operation still uses up its seq. Losses and their formulas are in `shared.models.losses`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from shared.contracts.arrays import Float32s, Int32s
from shared.contracts.base import Contract, Failure, Strict
from shared.contracts.blobs import BlobRef
from shared.contracts.checkpoints import CheckpointKey, CheckpointRecord, SaveSpec
from shared.contracts.policies import LoraSpec, PolicyRecord

LossName = Literal["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce"]


class AdamParams(Strict):
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2017, arXiv:1711.05101); may change at every step."""

    learning_rate: Annotated[float, msgspec.Meta(ge=0)] = 1e-4
    beta1: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.95
    eps: Annotated[float, msgspec.Meta(gt=0)] = 1e-12
    weight_decay: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    grad_clip_norm: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Largest allowed L2 norm of the run's whole gradient. 0: no clipping."""


class Datum(Contract):
    """One training sequence. All arrays have the length N of `tokens`; entry i belongs to predicting `targets[i]`.

    With K = `targets_per_token` above 1, `targets` and `weights` have the length N * K: K entries for each token.
    """

    tokens: Int32s
    """Model input, N token ids."""
    targets: Int32s
    """The token to predict at each position, N ids; or K of them for each position, one position behind the other."""
    weights: Float32s | None = None
    """Weight of each target for `cross_entropy`, or a mask of 0 and 1 for the policy losses. None: 1 everywhere."""
    logprobs: Float32s | None = None
    """Log-probabilities under the sampling policy, for the policy losses."""
    advantages: Float32s | None = None
    """For the policy losses."""
    ratio_mask: Float32s | None = None
    """For `gspo`: 1 for the tokens whose ratios make up that of the sequence, 0 for others. None: where `weights` are
    not 0."""
    targets_per_token: int = 1
    """K. More than 1 only for `cross_entropy`, to distil from a distribution over several tokens."""


class LossSpec(Contract):
    """A loss by name with its parameters, for instance `ppo` with `clip_low` and `clip_high` (docs/losses.md)."""

    name: LossName
    params: dict[str, float] = {}


class Operation(Contract, tag_field="op", kw_only=True):
    """An entry of a run's log."""

    run: str
    seq: Annotated[int, msgspec.Meta(ge=0)]
    request_id: str
    """Where the result goes."""
    owner: str = "default"
    note: str = ""
    """The asker's own, given back in the answer."""


class CreateRun(Operation, tag="create", kw_only=True):
    """Begin a run with a fresh adapter, or with a checkpoint's. Always seq 0."""

    base_model: str
    lora: LoraSpec = LoraSpec()
    source: CheckpointKey | None = None
    """A training checkpoint to begin with, of any run of the same base model. None: a fresh adapter."""
    optimizer: bool = False
    """Take over the checkpoint's optimizer too, not only its weights."""


class ForwardBackward(Operation, tag="forward_backward", kw_only=True):
    """Compute a loss and add its gradient to the run's, or only compute it."""

    data: list[Datum]
    loss: LossSpec
    forward_only: bool = False


class OptimStep(Operation, tag="optim_step", kw_only=True):
    """Apply the gathered gradient and clear it."""

    adam: AdamParams = AdamParams()


class SavePolicy(Operation, tag="save_policy", kw_only=True):
    """Publish the present weights as the immutable policy `run@version`."""

    version: Annotated[int, msgspec.Meta(ge=0)]
    checkpoint: SaveSpec | None = None
    """Also record it as a sampler checkpoint of this name. None: it serves only whoever knows its version."""
    inflight: bool = False
    """Also make it the run's policy for sampling in flight."""


class SaveState(Operation, tag="save_state", kw_only=True):
    """Write a checkpoint of weights and optimizer under a name, to load or to resume from."""

    name: str
    checkpoint: SaveSpec | None = None
    """Record it in the `checkpoints` bucket. None: whoever reads the answer keeps the reference."""


class SaveExternal(Operation, tag="save_external", kw_only=True):
    """Write the present weights as PEFT's files, to be downloaded."""

    checkpoint: SaveSpec
    recipients: list[str] = []
    """Public keys of age (age-encryption.org/v1): the files are encrypted for all of these. Empty: not encrypted."""


class LoadState(Operation, tag="load_state", kw_only=True):
    """Replace the run's weights by those of a training checkpoint of the same base model and shape of adapter.

    A gathered gradient is dropped.
    """

    source: CheckpointKey
    optimizer: bool = False
    """Take over the optimizer too. Otherwise it begins anew."""


class Refused(Operation, tag="refused", kw_only=True):
    """An operation that was refused before it came here. It uses up its seq, and its asker is told why."""

    failure: Failure


AnyOperation = CreateRun | ForwardBackward | OptimStep | SavePolicy | SaveState | SaveExternal | LoadState | Refused


class OperationResult(Contract, tag_field="kind", tag="operation"):
    """What an operation gave: the fields that its kind of operation fills."""

    request_id: str
    run: str
    seq: int
    metrics: dict[str, float] = {}
    """Named `what:reduction`, for instance `loss:sum`; the reduction joins the parts of a split batch."""
    logprobs: list[Float32s] = []
    """Of `targets`, and as many: one array of N, or of N * K, for each datum."""
    policy: PolicyRecord | None = None
    checkpoint: BlobRef | None = None
    recorded: CheckpointRecord | None = None
    """The checkpoint that an operation with a `SaveSpec` recorded."""
    op: str = ""
    """The kind of operation, as in its `op`. Empty: not told."""
    submitted: float = 0.0
    """When the operation came into the run's log, in seconds since the epoch. 0: not told."""
    note: str = ""
    """Of the operation."""


class SnapshotRecord(Contract):
    """Where recovery of a run begins: the state after operation `seq`."""

    seq: int
    stream_seq: int
    """Position of that operation in the TRAIN stream; replay begins behind it."""
    state: BlobRef


class RunRecord(Contract):
    """A run as the `runs` bucket knows it."""

    run: str
    base_model: str
    lora: LoraSpec
    owner: str = "default"
    snapshot: SnapshotRecord | None = None
    closed: bool = False
    """No more operations come: trainers let go of it."""
    session: str = ""
    """Of the client that made it. Empty: a job's."""
    created: float = 0.0
    """Seconds since the epoch."""
    user_metadata: dict[str, Any] = {}
    model_name: str = ""
    """How its client calls the base model: by this name, an alias, or a directory. Empty: by this name."""


class Lease(Contract):
    """Who works on a run or a job now. The revision of its KV entry is the fencing token."""

    holder: str
    """Name of the replica."""
