"""Every reason why values of a recipe that are right by themselves do not go together. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fedloom.data.catalog import CATALOG, LOCAL
from fedloom.errors import suggest
from fedloom.evaluate.tasks import TASKS
from fedloom.evaluate.tasks.sets import SETS, names_tasks
from fedloom.study.settings import (
    ADAPTER_DEFAULTS,
    AGGREGATE_DEFAULTS,
    BEST_BY,
    CLIENT_OPTIM_DEFAULTS,
    COMPRESS_DEFAULTS,
    COMPRESS_ORDER,
    DEFAULT_VAL_SHARE,
    DPO_DEFAULTS,
    LINEAR_OPTIMS,
    LOSSY,
    RUNTIME_DEFAULTS,
    SERVER_OPTIM_DEFAULTS,
    SUMS,
    WITH_FACTORS,
    ZEROTH_DEFAULTS,
)
from fedloom.study.yaml_text import yaml_value

if TYPE_CHECKING:
    from fedloom.study.recipe import Recipe

__all__ = ["Objection", "is_builtin", "objections"]


def is_builtin(path: object) -> bool:
    return isinstance(path, str) and path.startswith("builtin:")


class Objection(NamedTuple):
    """One reason why values that are right by themselves do not go together."""

    keys: tuple[str, ...]  # dotted; the first is the one to look at, all must be sound for the reason to hold
    message: str


def objections(recipe: Recipe) -> Iterator[Objection]:
    """Every reason why the recipe's parts do not go together, found without data and without the model."""
    yield from _data_objections(recipe)
    yield from _split_objections(recipe)
    yield from _quantization_objections(recipe)
    yield from _training_objections(recipe)
    yield from _evaluate_objections(recipe)
    yield from _compress_objections(recipe)
    yield from _tracking_objections(recipe)


def _quantization_objections(recipe: Recipe) -> Iterator[Objection]:
    """Packed weights can be read, and not be moved or trained."""
    kind, adapter, aggregate = recipe.quantization, recipe.adapter.kind, recipe.aggregate.kind
    if kind == "none":
        return
    reasons = {
        "full": "trains the model's own weights",
        "last_layers": "trains the model's own weights",
        "seed_space": "moves the model's own weights",
        "dora": "needs the norms of the weights",
    }
    if adapter in reasons:
        yield Objection(
            ("quantization", "adapter.kind"),
            f"{kind}, but adapter.kind {adapter} {reasons[adapter]}, which are packed: adapter.kind: lora, or "
            "quantization: none",
        )
    if aggregate in ("flora", "fedex_lora"):
        yield Objection(
            ("quantization", "aggregate.kind", "method"),
            f"{kind}, but {aggregate} adds to the frozen weights in every round, and packed ones take no small change: "
            "method: fedavg or flex_lora, or quantization: none",
        )
    if recipe.start_from is not None:
        yield Objection(
            ("quantization", "start_from"),
            f"{kind}, but start_from merges into the weights, which are packed: quantization: none, or for model: the "
            "folder that fedloom export --format merged writes",
        )
    if recipe.runtime.shard_base:
        yield Objection(
            ("quantization", "runtime.shard_base"),
            f"{kind}, but runtime.shard_base cuts weights up, and packed ones have scales beside them: one or the "
            "other",
        )
    if recipe.dtype == "float64":
        yield Objection(
            ("dtype", "quantization"),
            f"float64, but a base in {kind} computes in float32, bfloat16 or float16: float32",
        )


def _data_objections(recipe: Recipe) -> Iterator[Objection]:
    data = recipe.data
    if data.name is not None and data.name not in (*CATALOG, LOCAL):
        known = suggest(data.name, [*CATALOG, LOCAL])
        yield Objection(("data.name",), f"{data.name}, but there is no such data set{known}: fedloom ls data")
    if data.name is not None and (data.path in CATALOG or is_builtin(data.path)):
        yield Objection(("data.path", "data.name"), f"{data.path}, but data.name is {data.name}: leave one of them out")
    if not data.path and data.name in (None, LOCAL):
        yield Objection(
            ("data.path",), "missing: a file, a folder, a hub id, builtin:skills, or a name that fedloom ls data shows"
        )
    if is_builtin(data.path):
        natural = recipe.split.kind == "natural"
        given: dict[str, Any] = {
            "test_path": data.test_path,
            "type": None if data.type in ("auto", "preference") else data.type,
            "columns": data.columns or None,
            "val_set_size": data.val_set_size if natural and data.val_set_size != DEFAULT_VAL_SHARE else None,
            "test_set_size": data.test_set_size,
        }
        for key, value in given.items():
            if value is not None:
                yield Objection(
                    (f"data.{key}", "data.path"),
                    f"{yaml_value(value)} would have no effect: {data.path} brings its own rows",
                )
    elif data.test_path is not None and data.test_set_size is not None:
        yield Objection(
            ("data.test_set_size", "data.test_path"),
            f"{data.test_set_size} would have no effect: data.test_path gives the test rows; leave one of them out",
        )
    shares = [size for size in (data.val_set_size, data.test_set_size) if isinstance(size, float)]
    if sum(shares) >= 1:
        yield Objection(
            ("data.val_set_size", "data.test_set_size"),
            f"{data.val_set_size} + data.test_set_size {data.test_set_size} = {sum(shares):g}: "
            "nothing would be left to train on; together below 1",
        )


_SPLIT_SETTINGS: Mapping[str, tuple[str, ...]] = {  # which kinds of split have them
    "alpha": ("dirichlet", "quantity_skew"),
    "column": ("by_column", "dirichlet", "shards"),
    "shards_per_client": ("shards",),
    "min_rows": ("by_category", "by_column", "files"),
}


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def _split_objections(recipe: Recipe) -> Iterator[Objection]:
    split = recipe.split
    if split.kind == "natural" and (recipe.data.path or recipe.data.name) and not is_builtin(recipe.data.path):
        yield Objection(
            ("split.kind", "data.path"),
            "natural is what built-in tasks bring; your own data takes iid, dirichlet, shards, quantity_skew, "
            "by_category, by_column or files",
        )
    if split.kind in ("dirichlet", "quantity_skew") and split.alpha is None:
        yield Objection(("split.alpha", "split.kind"), f"missing: {split.kind} needs it, for example alpha: 0.5")
    if split.kind == "by_column" and split.column is None:
        yield Objection(("split.column", "split.kind"), "missing: by_column needs the column to split by")
    for key, kinds in _SPLIT_SETTINGS.items():
        value = getattr(split, key)
        if value is not None and split.kind not in kinds:
            having = f"{_listed(kinds)} {'has' if len(kinds) == 1 else 'have'} it"
            yield Objection(
                (f"split.{key}", "split.kind"), f"{value} would have no effect: kind is {split.kind}; {having}"
            )
    per_round = recipe.clients_per_round
    if isinstance(per_round, int) and split.clients is not None and per_round > split.clients:
        yield Objection(
            ("clients_per_round", "split.clients"),
            f"{per_round}, but the split has {split.clients} client{'s' if split.clients > 1 else ''}: "
            f"at most {split.clients}, or split.clients >= {per_round}",
        )


def _training_objections(recipe: Recipe) -> Iterator[Objection]:
    if recipe.local_steps is not None and recipe.local_epochs is not None:
        yield Objection(
            ("local_epochs", "local_steps"),
            f"{recipe.local_epochs}, and local_steps {recipe.local_steps} as well: leave one of them out",
        )
    if recipe.local_steps is None and recipe.local_epochs is None:
        yield Objection(
            ("local_steps", "local_epochs"),
            "missing: how long a client trains in a round, local_steps: 30 say, or local_epochs: 1",
        )
    client, server = recipe.client, recipe.server
    optional = ("momentum", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    for key in optional:
        value = getattr(client, key)
        if value is not None and key not in CLIENT_OPTIM_DEFAULTS[client.optim]:
            having = [name for name, settings in CLIENT_OPTIM_DEFAULTS.items() if key in settings]
            yield Objection(
                (f"client.{key}", "client.optim"),
                f"{value} would have no effect: optim is {client.optim}; {', '.join(having)} "
                f"{'has' if len(having) == 1 else 'have'} it",
            )
    if client.min_lr_ratio is not None and client.lr_scheduler_type == "constant":
        yield Objection(
            ("client.min_lr_ratio", "client.lr_scheduler_type"),
            f"{client.min_lr_ratio} would have no effect: lr_scheduler_type is constant; linear and cosine have an end",
        )
    if client.warmup_rounds >= recipe.rounds:
        yield Objection(
            ("client.warmup_rounds", "rounds"),
            f"{client.warmup_rounds}, but there {'are' if recipe.rounds > 1 else 'is'} {recipe.rounds} "
            f"round{'s' if recipe.rounds > 1 else ''}: at most {recipe.rounds - 1}",
        )
    if client.prox_mu > 0 and recipe.method == "fedavg":
        yield Objection(
            ("client.prox_mu", "method"),
            f"{client.prox_mu} makes this FedProx, and the method says fedavg: set method: fedprox",
        )
    yield from _adapter_objections(recipe)
    yield from _drift_objections(recipe)
    yield from _factor_objections(recipe)
    yield from _dpo_objections(recipe)
    yield from _zeroth_objections(recipe)
    settings = {
        key: getattr(server, key)
        for key in (
            "server_optim",
            "server_learning_rate",
            "server_momentum",
            "server_beta1",
            "server_beta2",
            "server_tau",
        )
    }
    if server.kind == "replace":
        for key, value in settings.items():
            if value is not None:
                yield Objection(
                    (f"server.{key}", "server.kind", "method"),
                    f"{value} would have no effect: server.kind is replace; set method: fedavgm, fedadam, fedyogi, "
                    "fedadagrad or diloco, or server.kind: optimize",
                )
    elif server.server_optim is None:
        yield Objection(
            ("server.server_optim", "server.kind"), "missing: optimize needs momentum, nesterov, adam, yogi or adagrad"
        )
    else:
        for key, value in settings.items():
            if value is not None and key != "server_optim" and key not in SERVER_OPTIM_DEFAULTS[server.server_optim]:
                having = [name for name, row in SERVER_OPTIM_DEFAULTS.items() if key in row]
                yield Objection(
                    (f"server.{key}", "server.server_optim"),
                    f"{value} would have no effect: server_optim is {server.server_optim}; {', '.join(having)} "
                    f"{'has' if len(having) == 1 else 'have'} it",
                )
    yield from _runtime_objections(recipe)


def _runtime_objections(recipe: Recipe) -> Iterator[Objection]:
    runtime = recipe.runtime
    for key in dict.fromkeys(key for row in RUNTIME_DEFAULTS.values() for key in row):
        value = getattr(runtime, key)
        if value is not None and key not in RUNTIME_DEFAULTS.get(runtime.kind, {}):
            having = [name for name, row in RUNTIME_DEFAULTS.items() if key in row]
            yield Objection(
                (f"runtime.{key}", "runtime.kind"),
                f"{value} would have no effect: kind is {runtime.kind}"
                f"{', which takes one client at a time' if key == 'clients_per_batch' else ''}; {_listed(having)} "
                f"{'has' if len(having) == 1 else 'have'} it",
            )
    if runtime.shard_base:
        yield from _shard_objections(recipe)
    elif runtime.shard_offload:
        yield Objection(
            ("runtime.shard_offload", "runtime.shard_base"),
            "true would have no effect: without shard_base no process holds a part that could wait elsewhere",
        )
    for key in ("gradient_checkpointing", "activation_offload"):
        if getattr(runtime, key) and recipe.client.kind in ZEROTH_DEFAULTS:
            yield Objection(
                (f"runtime.{key}", "client.kind"),
                f"true would have no effect: client.kind is {recipe.client.kind}, which has no backward pass and keeps "
                "no activations",
            )
    if runtime.gradient_checkpointing and runtime.activation_offload:
        yield Objection(
            ("runtime.activation_offload", "runtime.gradient_checkpointing"),
            "true would have no effect: blocks that run again keep no activations: one or the other",
        )
    if runtime.lora_kernel != "plain" and recipe.adapter.kind != "lora":
        yield Objection(
            ("runtime.lora_kernel", "adapter.kind"),
            f"{runtime.lora_kernel} would have no effect: adapter.kind is {recipe.adapter.kind}; lora has it",
        )
    if runtime.personal_state != "auto" and not _keeps_state(recipe):
        yield Objection(
            ("runtime.personal_state", "method"),
            f"{runtime.personal_state} would have no effect: no client keeps anything from one round to its next",
        )
    elif runtime.personal_state == "disk" and runtime.kind in ("buffered", "loopback"):
        why = "what is under way is looked through each round" if runtime.kind == "buffered" else "each client keeps it"
        yield Objection(
            ("runtime.personal_state", "runtime.kind"), f"disk, but runtime.kind is {runtime.kind}: {why}; memory"
        )
    if recipe.method == "fedbuff" and runtime.kind != "buffered":
        yield Objection(
            ("runtime.kind", "method"), f"{runtime.kind}, but fedbuff is asynchronous: buffered, or method: fedavg"
        )
    if runtime.kind != "buffered":
        return
    at_once = recipe.clients_per_round if isinstance(recipe.clients_per_round, int) else recipe.split.clients
    if runtime.buffer_size is not None and at_once is not None and runtime.buffer_size > at_once:
        yield Objection(
            ("runtime.buffer_size", "clients_per_round"),
            f"{runtime.buffer_size}, but {at_once} clients train at once: at most {at_once}",
        )
    client, aggregate = recipe.client, recipe.aggregate
    wrong = {  # key -> (asked for, why it has no meaning)
        "client.kind": (client.kind != "sgd", "its clients need the parameters of their own round: sgd"),
        "client.trainable": (client.trainable == "alternate", "late uploads are of the other factor: all, or one"),
        "aggregate.kind": (aggregate.kind != "mean", "it adds clients' parameters up, not changes that may be late: "
                           "mean"),
        "aggregate.weighting": (aggregate.weighting == "loss", "losses of other rounds do not compare: data or "
                                "uniform"),
        "runtime.client_dropout": (runtime.client_dropout > 0, "there is no round to be missing from: 0"),
    }  # fmt: skip
    for key, (asked, why) in wrong.items():
        if asked:
            block, _, leaf = key.partition(".")
            yield Objection(
                (key, "runtime.kind", "method"),
                f"{getattr(getattr(recipe, block), leaf)}, but runtime.kind is buffered: {why}",
            )


def _keeps_state(recipe: Recipe) -> bool:
    """Whether clients have something of their own that lasts."""
    client = recipe.client
    own = client.shared != "all" or client.kind == "scaffold" or client.optimizer_state == "kept"
    return own or bool(recipe.compress.error_feedback) or "local" in recipe.arms


def _adapter_objections(recipe: Recipe) -> Iterator[Objection]:
    adapter = recipe.adapter
    for key in dict.fromkeys(key for row in ADAPTER_DEFAULTS.values() for key in row):
        value = getattr(adapter, key)
        if value is not None and key not in ADAPTER_DEFAULTS[adapter.kind]:
            having = [name for name, row in ADAPTER_DEFAULTS.items() if key in row]
            yield Objection(
                (f"adapter.{key}", "adapter.kind"),
                f"{yaml_value(value)} would have no effect: kind is {adapter.kind}; {', '.join(having)} "
                f"{'has' if len(having) == 1 else 'have'} it",
            )
    if adapter.kind == "dora":
        yield from _dora_objections(recipe)
    if adapter.bias not in (None, "none") and recipe.client.trainable != "all":
        yield Objection(
            ("adapter.bias", "client.trainable", "method"),
            f"{adapter.bias}, but client.trainable is {recipe.client.trainable}, which leaves biases as they are: "
            "adapter.bias: none",
        )
    if adapter.bottleneck_size is not None and adapter.reduction_factor is not None:
        yield Objection(
            ("adapter.reduction_factor", "adapter.bottleneck_size"),
            f"{adapter.reduction_factor:g}, but bottleneck_size is {adapter.bottleneck_size}: leave one of them out",
        )
    if adapter.kind not in WITH_FACTORS:
        needs = {
            "client.trainable": recipe.client.trainable != "all",
            "client.shared": recipe.client.shared != "all",
            "aggregate.kind": recipe.aggregate.kind not in SUMS,
        }
        for key, asked in needs.items():
            block, _, leaf = key.partition(".")
            if asked:
                yield Objection(
                    (key, "adapter.kind", "method"),
                    f"{getattr(getattr(recipe, block), leaf)}, but it works on LoRA's factors and adapter.kind is "
                    f"{adapter.kind}: adapter.kind: lora, or another method",
                )


def _dora_objections(recipe: Recipe) -> Iterator[Objection]:
    """Rules that are exact because a client's weight is W + B A; with a magnitude it is not."""
    client, aggregate = recipe.client, recipe.aggregate
    if aggregate.kind in ("flora", "flex_lora", "fedex_lora"):
        yield Objection(
            ("aggregate.kind", "adapter.kind", "method"),
            f"{aggregate.kind}, but with dora a client's weight is m (W + B A) / |W + B A|, and the sum of products "
            "that it makes exact is not the mean of these: adapter.kind: lora, or method: fedavg",
        )
    if client.trainable != "all":
        yield Objection(
            ("client.trainable", "adapter.kind", "method"),
            f"{client.trainable}, but then dora's magnitudes would never be trained: adapter.kind: lora, or another "
            "method",
        )


def _dpo_objections(recipe: Recipe) -> Iterator[Objection]:
    """The loss on pairs. What the rows are is known here only where data.type says it."""
    dpo, data = recipe.dpo, recipe.data
    if recipe.start_from is not None and recipe.adapter.kind != "lora":
        yield Objection(
            ("start_from", "adapter.kind"),
            f"{recipe.start_from}, but adapter.kind is {recipe.adapter.kind}: what is merged is written out together "
            "with the new adapter, and only lora can hold both",
        )
    elif recipe.start_from is not None and recipe.adapter.bias not in (None, "none"):
        yield Objection(
            ("start_from", "adapter.bias"),
            f"{recipe.start_from}, but adapter.bias is {recipe.adapter.bias}: what is written out has factors of both "
            "adapters, and no biases",
        )
    if data.type == "preference":
        if recipe.adapter.kind == "seed_space":
            yield Objection(
                ("data.type", "adapter.kind", "method"),
                "preference, but seed_space moves the only copy of the weights, so the reference would have to be "
                "replayed from the start at every step: an adapter, method: fedmezo say",
            )
        if data.train_on_inputs:
            yield Objection(
                ("data.train_on_inputs", "data.type"),
                "true would have no effect: both answers of a pair have the same prompt, and it cancels",
            )
        for key in ("beta", "label_smoothing"):
            value = getattr(dpo, key)
            if value is not None and key not in DPO_DEFAULTS[dpo.loss_type or "sigmoid"]:
                having = [name for name, row in DPO_DEFAULTS.items() if key in row]
                yield Objection(
                    (f"dpo.{key}", "dpo.loss_type"),
                    f"{value} would have no effect: loss_type is {dpo.loss_type}; {_listed(having)} have it",
                )
    elif data.type != "auto":
        for key in ("loss_type", "beta", "label_smoothing"):
            if getattr(dpo, key) is not None:
                yield Objection(
                    (f"dpo.{key}", "data.type"),
                    f"{getattr(dpo, key)} would have no effect: data.type is {data.type}; preference has pairs",
                )


def _factor_objections(recipe: Recipe) -> Iterator[Objection]:
    """LoRA's factors: which are trained, which are sent, at which ranks."""
    client, aggregate, mix = recipe.client, recipe.aggregate, recipe.adapter.client_ranks
    if client.shared != "all" and client.trainable not in ("all", client.shared):
        yield Objection(
            ("client.shared", "client.trainable"),
            f"{client.shared}, but client.trainable is {client.trainable}: what is sent must be trained in every round",
        )
    elif client.shared != "all" and client.trainable == client.shared:
        yield Objection(
            ("client.shared", "client.trainable"),
            f"{client.shared} would have no effect: client.trainable is {client.trainable}, so nothing else is trained",
        )
    if client.shared != "all" and aggregate.kind not in SUMS:
        yield Objection(
            ("client.shared", "aggregate.kind"),
            f"{client.shared}, but {aggregate.kind} needs both factors of every client: aggregate.kind: mean",
        )
    if client.trainable != "all" and aggregate.kind not in SUMS:
        yield Objection(
            ("client.trainable", "aggregate.kind"),
            f"{client.trainable}, but {aggregate.kind} is for clients that train both factors: aggregate.kind: mean",
        )
    for key, value in ((key, getattr(aggregate, key)) for row in AGGREGATE_DEFAULTS.values() for key in row):
        if value is not None and key not in AGGREGATE_DEFAULTS.get(aggregate.kind, {}):
            having = [name for name, row in AGGREGATE_DEFAULTS.items() if key in row]
            yield Objection(
                (f"aggregate.{key}", "aggregate.kind"),
                f"{yaml_value(value)} would have no effect: kind is {aggregate.kind}; {_listed(having)} "
                f"{'has' if len(having) == 1 else 'have'} it",
            )
    if aggregate.kind == "het_lora" and aggregate.norm_weighted and aggregate.weighting == "uniform":
        yield Objection(
            ("aggregate.weighting", "aggregate.norm_weighted"),
            "uniform would have no effect: het_lora weighs by norms; norm_weighted: false leaves it to the weighting",
        )
    if mix not in (None, "same") and recipe.adapter.lora_r == 1:
        yield Objection(("adapter.client_ranks", "adapter.lora_r"), f"{mix} would have no effect: lora_r is 1")


def _drift_objections(recipe: Recipe) -> Iterator[Objection]:
    """Clients that keep control variates, tell their work or their loss, or keep their optimiser."""
    client, aggregate = recipe.client, recipe.aggregate
    if client.kind == "scaffold":
        means_nothing = {  # key -> (asked for, why it has no meaning)
            "client.trainable": (client.trainable == "alternate", "a control variate of one factor is of the other's "
                                 "old values two rounds later: all, or one factor"),
            "client.shared": (client.shared != "all", "what stays with the client does not drift from anything: all"),
            "client.prox_mu": (client.prox_mu > 0, "both pull against the same drift: 0"),
            "client.optimizer_state": (client.optimizer_state == "kept", "moments of old corrections: fresh"),
            "aggregate.kind": (aggregate.kind != "mean", "control variates are gradients at the mean of the clients' "
                               "parameters: mean"),
            "aggregate.weighting": (aggregate.weighting == "loss", "the mean of control variates needs fixed weights: "
                                    "uniform or data"),
            "adapter.client_ranks": (recipe.adapter.client_ranks not in (None, "same"), "control variates are of one "
                                     "rank: same"),
        }  # fmt: skip
        for key, (asked, why) in means_nothing.items():
            if asked:
                block, _, leaf = key.partition(".")
                yield Objection(
                    (key, "client.kind", "method"),
                    f"{yaml_value(getattr(getattr(recipe, block), leaf))}, but client.kind is scaffold: {why}",
                )
    if aggregate.fair_q is not None and aggregate.weighting != "loss":
        yield Objection(
            ("aggregate.fair_q", "aggregate.weighting"),
            f"{aggregate.fair_q} would have no effect: weighting is {aggregate.weighting}; loss has it",
        )
    if aggregate.weighting == "loss" and client.kind != "scaffold":
        if aggregate.kind != "mean":
            yield Objection(
                ("aggregate.weighting", "aggregate.kind"), f"loss, but {aggregate.kind} has weights of its own: mean"
            )
        if client.optim not in LINEAR_OPTIMS:
            yield Objection(
                ("client.optim", "aggregate.weighting", "method"),
                f"{client.optim}, but weighting loss takes a client's move over its learning rate for a gradient, "
                f"which {client.optim}'s steps are not: {' or '.join(LINEAR_OPTIMS)}",
            )
    if client.optimizer_state == "kept" and client.kind != "scaffold":
        if client.optim == "sgd":
            yield Objection(
                ("client.optimizer_state", "client.optim"), "kept would have no effect: optim is sgd, which has none"
            )
        if client.shared != "all" or client.trainable == "alternate":
            key = "client.shared" if client.shared != "all" else "client.trainable"
            yield Objection(
                ("client.optimizer_state", key),
                f"kept, but {key} is {getattr(client, key.partition('.')[2])}: fresh, or all",
            )
        if aggregate.kind == "fednova":
            yield Objection(
                ("client.optimizer_state", "aggregate.kind"),
                "kept, but fednova divides by the work of one round, and moments bring that of earlier ones: fresh",
            )


def _zeroth_objections(recipe: Recipe) -> Iterator[Objection]:
    """Updates without gradients, and the adapter that only they can train."""
    client, adapter = recipe.client, recipe.adapter
    in_seeds = adapter.kind == "seed_space"
    if in_seeds and client.kind != "zo":
        yield Objection(
            ("client.kind", "adapter.kind", "method"),
            f"{client.kind}, but adapter.kind is seed_space, whose numbers have no gradient: method: fedkseed or "
            "fedkseed_pro, or client.kind: zo",
        )
    if not in_seeds and client.kind == "zo":
        yield Objection(
            ("client.kind", "adapter.kind", "method"),
            f"zo, but adapter.kind is {adapter.kind}: adapter.kind: seed_space, or for adapters client.kind: mezo "
            "(method: fedmezo)",
        )
    if in_seeds and recipe.data.type == "preference":
        yield Objection(
            ("adapter.kind", "data.type"),
            "seed_space, but data.type is preference, whose reference is the untouched base, and seed_space moves the "
            "base's own weights: another kind, with method: fedmezo",
        )
    if in_seeds and recipe.dtype in ("bfloat16", "float16"):
        yield Objection(
            ("dtype", "adapter.kind"),
            f"{recipe.dtype}, but steps of seed_space are smaller than it can tell apart: float32",
        )
    if in_seeds and adapter.seed_sampling == "magnitude" and recipe.server.kind != "replace":
        yield Objection(
            ("server.kind", "adapter.seed_sampling"),
            f"{recipe.server.kind}, but magnitude counts how often each seed was drawn, and such counts are no steps: "
            "server.kind: replace, or seed_sampling: uniform",
        )
    if client.kind not in ZEROTH_DEFAULTS:
        if client.zo_eps is not None:
            yield Objection(
                ("client.zo_eps", "client.kind"),
                f"{client.zo_eps} would have no effect: client.kind is {client.kind}; mezo and zo have it",
            )
        return
    if client.max_grad_norm is not None:
        yield Objection(
            ("client.max_grad_norm", "client.kind"),
            f"{client.max_grad_norm} would have no effect: client.kind is {client.kind}, without gradients: leave it "
            "out, or max_grad_norm: null",
        )
    if client.prox_mu > 0:
        yield Objection(
            ("client.prox_mu", "client.kind"),
            f"{client.prox_mu} would have no effect: client.kind is {client.kind}; sgd has it",
        )
    if recipe.aggregate.kind == "fednova":
        yield Objection(
            ("aggregate.kind", "client.kind"),
            f"fednova, but clients of kind {client.kind} do not tell their work: mean",
        )
    if client.optimizer_state == "kept":
        yield Objection(
            ("client.optimizer_state", "client.kind"), f"kept, but clients of kind {client.kind} start anew: fresh"
        )
    if client.kind == "zo":
        if recipe.aggregate.weighting == "loss":
            yield Objection(
                ("aggregate.weighting", "client.kind"),
                "loss, but clients of kind zo do not tell their loss at the start: data or uniform",
            )
        if client.optim != "sgd":
            yield Objection(
                ("client.optim", "client.kind"),
                f"{client.optim}, but client.kind zo makes plain steps, whose sums are what travels: optim: sgd",
            )
        if client.weight_decay:
            yield Objection(
                ("client.weight_decay", "client.kind"),
                f"{client.weight_decay}, but weights that decay are no sum of directions: weight_decay: 0",
            )


def _compress_objections(recipe: Recipe) -> Iterator[Objection]:
    compress = recipe.compress
    for way in ("up", "down"):
        kinds: list[str] = list(getattr(compress, way))
        for group in COMPRESS_ORDER:
            several = [kind for kind in kinds if kind in group]
            if len(several) > 1:
                yield Objection((f"compress.{way}",), f"{', '.join(several)}: one of them is enough")
        order = [kind for group in COMPRESS_ORDER for kind in group if kind in kinds]
        if len(set(kinds)) == len(kinds) and order != kinds:
            yield Objection((f"compress.{way}",), f"{yaml_value(kinds)}: in this order: {yaml_value(order)}")
    if compress.bits not in (None, 4, 8):
        yield Objection(("compress.bits",), f"{compress.bits}: must be 8 or 4")
    used = {*compress.up, *compress.down}
    for key in ("bits", "block_size", "share", "low_rank_r"):
        having = [kind for kind, row in COMPRESS_DEFAULTS.items() if key in row]
        if getattr(compress, key) is not None and not used.intersection(having):
            yield Objection(
                (f"compress.{key}", "compress.up", "compress.down"),
                f"{getattr(compress, key)} would have no effect: it is a setting of {' and '.join(having)}",
            )
    lossy = [kind for kind in compress.up if kind in LOSSY]
    if compress.error_feedback is True and not lossy:
        yield Objection(
            ("compress.error_feedback", "compress.up"), "true would have no effect: nothing is lost on the way up"
        )
    if compress.error_feedback and recipe.adapter.client_ranks not in (None, "same"):
        yield Objection(
            ("compress.error_feedback", "adapter.client_ranks"),
            f"true, but what is left out has no fixed size with client_ranks {recipe.adapter.client_ranks}: false",
        )


def _tracking_objections(recipe: Recipe) -> Iterator[Objection]:
    if recipe.report_to == "none" and recipe.project is not None:
        yield Objection(
            ("project", "report_to"),
            f"{yaml_value(recipe.project)} would have no effect: report_to is none, so no tracker files the run there",
        )


def _shard_objections(recipe: Recipe) -> Iterator[Objection]:
    """A base in parts is for what leaves it as it is and goes back once for each loss."""
    kind, rule, key = recipe.adapter.kind, recipe.aggregate.kind, "runtime.shard_base"
    if kind in ("full", "last_layers", "seed_space"):
        yield Objection((key, "adapter.kind"), f"true, but {kind} moves the base's own weights: they must be whole")
    elif kind != "lora":
        yield Objection((key, "adapter.kind"), f"true, which is for adapter.kind lora so far, not {kind}")
    if rule in ("flora", "fedex_lora"):
        yield Objection((key, "aggregate.kind"), f"true, but {rule} adds to the base's weights: they must be whole")
    if recipe.data.type == "preference":
        yield Objection((key, "data.type"), "true, but a loss on pairs makes several passes before it goes back")


def _evaluate_objections(recipe: Recipe) -> Iterator[Objection]:
    evaluate = recipe.evaluate
    if evaluate.score == "none" and evaluate.max_new_tokens is not None:
        yield Objection(
            ("evaluate.max_new_tokens", "evaluate.score"),
            f"{evaluate.max_new_tokens} would have no effect: score is none, so nothing is generated",
        )
    if evaluate.score == "none" and evaluate.score_validation:
        yield Objection(
            ("evaluate.score_validation", "evaluate.score"),
            "true would have no effect: score is none, so nothing is scored",
        )
    yield from _best_objections(recipe)
    yield from _task_objections(recipe)


def _best_objections(recipe: Recipe) -> Iterator[Objection]:
    evaluate = recipe.evaluate
    best_by = evaluate.best_by
    slash = "/" in (best_by or "")
    if best_by is not None and slash:
        named = any(best_by.startswith(f"{task}/") and best_by != f"{task}/" for task in evaluate.tasks)
        if not named and not best_by.startswith("lm_eval:"):  # the task of a file of one's own has a name of its own
            yield Objection(
                ("evaluate.best_by", "evaluate.tasks"),
                f"{best_by}, but evaluate.tasks is {yaml_value(evaluate.tasks)}: a TASK/METRIC names one of them",
            )
        elif evaluate.task_rounds is None:
            yield Objection(
                ("evaluate.best_by", "evaluate.task_rounds"),
                f"{best_by}, but the benchmarks run only at the end: set evaluate.task_rounds",
            )
    elif best_by is not None and best_by not in BEST_BY:
        near = difflib.get_close_matches(best_by, BEST_BY, n=1)
        yield Objection(
            ("evaluate.best_by",),
            f"{best_by}, which is none of {', '.join(BEST_BY)} and no TASK/METRIC"
            + (f"; did you mean {near[0]}?" if near else ""),
        )
    elif best_by == "preference_accuracy" and recipe.data.type not in ("auto", "preference"):
        yield Objection(
            ("evaluate.best_by", "data.type"),
            f"{best_by}, but data.type is {recipe.data.type}: only preference rows have pairs",
        )
    elif best_by is not None and best_by.startswith("score") and evaluate.score == "none":
        yield Objection(("evaluate.best_by", "evaluate.score"), f"{best_by}, but evaluate.score is none: best_by: loss")
    if best_by is not None and not slash and recipe.data.val_set_size == 0:
        yield Objection(
            ("evaluate.best_by", "data.val_set_size"),
            f"{best_by} would have no effect: data.val_set_size is 0, so there is nothing to choose by",
        )
    patience = evaluate.early_stopping_patience
    if patience is None and evaluate.early_stopping_threshold is not None:
        yield Objection(
            ("evaluate.early_stopping_threshold", "evaluate.early_stopping_patience"),
            f"{evaluate.early_stopping_threshold} would have no effect: early_stopping_patience is not set",
        )
    if patience is not None and best_by is None:
        yield Objection(
            ("evaluate.early_stopping_patience", "data.val_set_size", "evaluate.best_by"),
            f"{patience}, but data.val_set_size is 0, so there is nothing to stop by: set aside validation rows",
        )
    elif patience is not None and not slash and evaluate.eval_rounds == 0:
        yield Objection(
            ("evaluate.early_stopping_patience", "evaluate.eval_rounds"),
            f"{patience}, but eval_rounds is 0, so nothing is measured before the end: eval_rounds: 1, say",
        )
    if recipe.checkpoint.export == "best" and best_by is None:
        yield Objection(
            ("checkpoint.export", "data.val_set_size", "evaluate.best_by"),
            "best, but data.val_set_size is 0, so there is nothing to choose by: export: last, or validation rows",
        )


def _task_objections(recipe: Recipe) -> Iterator[Objection]:
    evaluate = recipe.evaluate
    twice = sorted({task for task in evaluate.tasks if evaluate.tasks.count(task) > 1})
    if twice:
        yield Objection(("evaluate.tasks",), f"{', '.join(twice)} is named twice")
    for task in evaluate.tasks:
        if not names_tasks(task):
            near = suggest(task, [*TASKS, *SETS])
            yield Objection(("evaluate.tasks",), f"there is no benchmark {task!r}{near}: fedloom ls tasks")
    if not evaluate.tasks:
        given: dict[str, Any] = {
            "task_paths": evaluate.task_paths or None,
            "task_limit": evaluate.task_limit,
            "num_fewshot": evaluate.num_fewshot,
            "task_rounds": evaluate.task_rounds,
            "task_clients": evaluate.task_clients,
        }
        for key, value in given.items():
            if value is not None:
                yield Objection(
                    (f"evaluate.{key}", "evaluate.tasks"),
                    f"{yaml_value(value)} would have no effect: evaluate.tasks is empty",
                )
        return
    for task in evaluate.task_paths:
        if task not in evaluate.tasks:
            yield Objection(
                ("evaluate.task_paths", "evaluate.tasks"),
                f"{task} is none of evaluate.tasks, which are {', '.join(evaluate.tasks)}",
            )
    personal = recipe.client.shared != "all" and "federated" in recipe.arms
    if evaluate.task_clients is not None and "local" not in recipe.arms and not personal:
        yield Objection(
            ("evaluate.task_clients", "arms"),
            f"{evaluate.task_clients} would have no effect: no client has a model of its own in these arms",
        )
    if personal and recipe.runtime.kind == "loopback":
        yield Objection(
            ("evaluate.tasks", "runtime.kind", "client.shared"),
            f"{yaml_value(evaluate.tasks)}, but with runtime.kind loopback what is not shared never leaves a client, "
            "and the benchmarks are not there: runtime.kind: batched",
        )
