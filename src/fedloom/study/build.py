"""From a validated recipe to values that run: the only place that knows names, as literal tables."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fedloom.adapters import (
    bottleneck,
    dora,
    dpo,
    full,
    ia3,
    last_layers,
    lora,
    p_tuning,
    prefix_tuning,
    prompt_tuning,
    seed_space,
    with_activation_cache,
    with_activation_offload,
    with_recompute,
    with_triton,
)
from fedloom.adapters import offloading as offloading  # noqa: PLC0414  # no other room of the study imports adapters
from fedloom.adapters import recomputing as recomputing  # noqa: PLC0414
from fedloom.adapters import start as starting
from fedloom.adapters.targets import decoder_blocks
from fedloom.aggregates import fed_exp, fedex_lora, fednova, flex_lora, flora, het_lora, mean, q_fedavg, scaffold
from fedloom.clients import (
    alternate,
    error_feedback,
    fednova_client,
    local_only,
    mezo_client,
    scaffold_client,
    sgd_client,
    split_personal,
    tells_start_loss,
    with_control,
    zo_client,
)
from fedloom.compress import cast, low_rank, nonzero, quantize, random_k, top_k, zstd
from fedloom.data.clients import Clients, population
from fedloom.data.federation import ClientData, Federation
from fedloom.data.pair_batches import Pairs
from fedloom.data.tokens import pad_id_of
from fedloom.errors import UserError
from fedloom.models.load import Base, hardware_dtype, load_tokenizer
from fedloom.ops.loss_scale import scaling_in
from fedloom.ops.ranks import Ranks
from fedloom.optimizers import Optimizer, adagrad, adam, adamw, decay, sgd, yogi
from fedloom.personal import Store
from fedloom.rounds import Sampling
from fedloom.runtimes import ClientSite, Room, batched, buffered, loopback, sequential, with_dropout, with_ranks
from fedloom.runtimes import payload as sides
from fedloom.runtimes.clock import speeds
from fedloom.runtimes.cohort import SKIPPED
from fedloom.runtimes.distributed import distributed
from fedloom.runtimes.lead import Lead
from fedloom.runtimes.shards import Shards, shard
from fedloom.runtimes.team import Team
from fedloom.seeds import seed_of
from fedloom.servers import fed_adagrad, fed_adam, fed_avgm, fed_yogi, nesterov, replace
from fedloom.study.blocks import AdapterRecipe, ClientRecipe, CompressRecipe, ServerRecipe
from fedloom.study.recipe import Recipe
from fedloom.study.settings import ZEROTH_DEFAULTS
from fedloom.types import (
    Adapter,
    Aggregate,
    Algorithm,
    Client,
    ClientUpdate,
    Evaluation,
    Runtime,
    ServerUpdate,
    Site,
    State,
    Trained,
    Transform,
    Tree,
)

logger = logging.getLogger("fedloom")

POOLED = "pooled"  # the one client of the global arm
CPU_NUMBERS_PER_PASS = 640_000  # tokens x hidden size: beyond it a wider pass loses on a CPU (benchmarks/throughput)
GPU_TOKENS_PER_PASS = 32_768
PERSONAL_BYTES = 1 << 30  # of all clients' personal state; beyond it, it lies on disk
WEIGHTS_PER_PASS = 32_000_000  # trained numbers of all clients in a pass: each has its own, its gradient, its optimiser

# Shares of clients with an eighth, a quarter, half and all of the adapter's rank.
RANK_MIXES: Mapping[str, tuple[float, ...]] = {
    "heavy_tail": (0.60, 0.25, 0.10, 0.05),
    "normal": (0.15, 0.35, 0.35, 0.15),
    "uniform": (0.25, 0.25, 0.25, 0.25),
}

CLIENT_OPTIMIZERS: Mapping[str, Callable[[ClientRecipe], Optimizer]] = {
    "adamw": lambda r: adamw(r.learning_rate, weight_decay=r.weight_decay or 0.0, **_betas(r)),
    "adam": lambda r: adam(r.learning_rate, **_betas(r)),
    "yogi": lambda r: yogi(r.learning_rate, **_betas(r)),
    "adagrad": lambda r: adagrad(r.learning_rate, epsilon=_given(r.adam_epsilon)),
    "sgd": lambda r: sgd(r.learning_rate, weight_decay=r.weight_decay or 0.0),
    "momentum": lambda r: sgd(r.learning_rate, momentum=_given(r.momentum), weight_decay=r.weight_decay or 0.0),
}

SERVER_OPTIMIZERS: Mapping[str, Callable[[ServerRecipe], ServerUpdate]] = {
    "momentum": lambda r: fed_avgm(_given(r.server_learning_rate), momentum=_given(r.server_momentum)),
    "nesterov": lambda r: nesterov(_given(r.server_learning_rate), momentum=_given(r.server_momentum)),
    "adam": lambda r: fed_adam(_given(r.server_learning_rate), **_server_betas(r)),
    "yogi": lambda r: fed_yogi(_given(r.server_learning_rate), **_server_betas(r)),
    "adagrad": lambda r: fed_adagrad(
        _given(r.server_learning_rate), beta1=_given(r.server_beta1), tau=_given(r.server_tau)
    ),
}

SERVERS: Mapping[str, Callable[[ServerRecipe], ServerUpdate]] = {
    "replace": lambda r: replace(),
    "optimize": lambda r: SERVER_OPTIMIZERS[r.server_optim or ""](r),
}

AGGREGATES: Mapping[str, Callable[[Recipe], Aggregate]] = {
    "mean": lambda r: mean(),
    "fednova": lambda r: fednova(),
    "fedexp": lambda r: fed_exp(epsilon=_given(r.aggregate.exp_epsilon)),
    "flora": lambda r: flora(scale_of(r)),
    "flex_lora": lambda r: flex_lora(),
    "fedex_lora": lambda r: fedex_lora(scale_of(r)),
    "het_lora": lambda r: het_lora(norm_weighted=r.aggregate.norm_weighted is not False, scale=scale_of(r)),
}


def lora_of(base: Base, recipe: AdapterRecipe) -> Adapter:
    return (lora if recipe.kind == "lora" else dora)(
        base.model,
        rank=recipe.lora_r or 8,
        alpha=_given(recipe.lora_alpha),
        dropout=recipe.lora_dropout or 0.0,
        targets=recipe.lora_target_modules or "auto",
        use_rslora=bool(recipe.use_rslora),
        rank_pattern=recipe.rank_pattern or {},
        alpha_pattern=recipe.alpha_pattern or {},
        bias=recipe.bias or "none",
        base_name=base.name,
    )


def ia3_of(base: Base, recipe: AdapterRecipe) -> Adapter:
    return ia3(
        base.model,
        targets=recipe.ia3_target_modules or "auto",
        feedforward=() if recipe.ia3_feedforward_modules == "none" else recipe.ia3_feedforward_modules or "auto",
        base_name=base.name,
    )


def prompt_of(base: Base, recipe: AdapterRecipe) -> Adapter:
    text = recipe.prompt_tuning_init_text
    ids = None if text is None else base.tokenizer(text, add_special_tokens=False)["input_ids"]
    return prompt_tuning(
        base.model, num_virtual_tokens=recipe.num_virtual_tokens or 20, init_ids=ids, base_name=base.name
    )


def p_tuning_of(base: Base, recipe: AdapterRecipe) -> Adapter:
    return p_tuning(
        base.model,
        num_virtual_tokens=recipe.num_virtual_tokens or 20,
        encoder=recipe.encoder_reparameterization_type or "mlp",
        encoder_hidden_size=recipe.encoder_hidden_size,
        base_name=base.name,
    )


def prefix_of(base: Base, recipe: AdapterRecipe) -> Adapter:
    return prefix_tuning(base.model, num_virtual_tokens=recipe.num_virtual_tokens or 20, base_name=base.name)


def saves_tokenizer_of(base: Base) -> Callable[[Path], None]:
    return lambda path: load_tokenizer(base.name, pad=False).save_pretrained(path)


def full_of(base: Base, recipe: AdapterRecipe) -> Adapter:
    return full(base.model, save_tokenizer=saves_tokenizer_of(base))


def last_layers_of(base: Base, recipe: AdapterRecipe) -> Adapter:
    return last_layers(
        base.model,
        layers=recipe.trainable_layers or 2,
        extra=recipe.trainable_extra or "none",
        save_tokenizer=saves_tokenizer_of(base),
    )


def bottleneck_of(base: Base, recipe: AdapterRecipe) -> Adapter:
    return bottleneck(
        base.model,
        size=recipe.bottleneck_size,
        reduction_factor=recipe.reduction_factor or 16.0,
        non_linearity=recipe.non_linearity or "relu",
        after=recipe.bottleneck_after or "attention_and_mlp",
        base_name=base.name,
    )


def seed_space_of(base: Base, recipe: AdapterRecipe) -> Adapter:
    return seed_space(
        base.model,
        num_seeds=recipe.num_seeds or 4096,
        seed=recipe.direction_seed or 0,
        magnitudes=recipe.seed_sampling == "magnitude",
        save_tokenizer=saves_tokenizer_of(base),
    )


def scale_of(recipe: Recipe) -> Callable[[str], float]:
    """What LoRA multiplies a layer's B A by, at the full rank."""
    adapter = recipe.adapter
    rank, alpha = int(_given(adapter.lora_r)), _given(adapter.lora_alpha)
    patterns = adapter.rank_pattern or {}, adapter.alpha_pattern or {}
    return Ranks(rank, alpha, bool(adapter.use_rslora), *patterns).scale


def sgd_of(recipe: Recipe, pieces: int = 1) -> ClientUpdate:
    """`pieces` multiplies the passes per optimiser step, for batches that are larger by as much."""
    client = recipe.client

    def on(*factors: str) -> ClientUpdate:
        optimizer, settings = CLIENT_OPTIMIZERS[client.optim](client), local_settings(recipe, pieces, *factors)
        if recipe.aggregate.kind == "fednova":
            return fednova_client(optimizer, prox_mu=client.prox_mu, **settings)
        kept = client.optimizer_state == "kept"
        return sgd_client(optimizer, prox_mu=client.prox_mu, keep_optimizer=kept, **settings)

    return by_factor(recipe, on)


def mezo_of(recipe: Recipe, pieces: int = 1) -> ClientUpdate:
    client = recipe.client

    def on(*factors: str) -> ClientUpdate:
        return mezo_client(
            CLIENT_OPTIMIZERS[client.optim](client),
            epsilon=_given(client.zo_eps),
            schedule=schedule_of(recipe),
            accumulation_steps=client.gradient_accumulation_steps * pieces,
            **({"trainable": lambda name: any(factor in name for factor in factors)} if factors else {}),
        )

    return by_factor(recipe, on)


def zo_of(recipe: Recipe, pieces: int = 1) -> ClientUpdate:
    client = recipe.client
    return zo_client(
        client.learning_rate,
        epsilon=_given(client.zo_eps),
        schedule=schedule_of(recipe),
        accumulation_steps=client.gradient_accumulation_steps * pieces,
    )


def by_factor(recipe: Recipe, on: Callable[..., ClientUpdate]) -> ClientUpdate:
    """Local work on all parameters or on some of LoRA's factors; what is sent of it, and what is told beside it."""
    client = recipe.client
    if client.trainable == "alternate":
        update = alternate(on("lora_B"), on("lora_A"))
    else:
        update = on() if client.trainable == "all" else on(client.trainable)
    if client.shared != "all":
        update = split_personal(update, lambda name: client.shared in name)
    return tells_start_loss(update) if recipe.aggregate.weighting == "loss" else update


def scaffold_of(recipe: Recipe, pieces: int = 1) -> ClientUpdate:
    client = recipe.client
    factors = () if client.trainable == "all" else (client.trainable,)
    return scaffold_client(CLIENT_OPTIMIZERS[client.optim](client), **local_settings(recipe, pieces, *factors))


def local_settings(recipe: Recipe, pieces: int, *factors: str) -> dict[str, Any]:
    """What the clients' updates have in common; of LoRA's factors only those named are trained."""
    return {
        "schedule": schedule_of(recipe),
        "max_grad_norm": recipe.client.max_grad_norm,
        "accumulation_steps": recipe.client.gradient_accumulation_steps * pieces,
        "loss_scaling": scales_loss(recipe),
        **({"trainable": lambda name: any(factor in name for factor in factors)} if factors else {}),
    }


def scales_loss(recipe: Recipe) -> bool:
    """Whether the base computes in float16, in which small gradients would be lost."""
    if recipe.dtype == "auto":
        return hardware_dtype("cuda" if torch.cuda.is_available() else "cpu")[0] == torch.float16
    return recipe.dtype == "float16"


def schedule_of(recipe: Recipe) -> Callable[[torch.Tensor], torch.Tensor]:
    client = recipe.client
    return decay(
        client.lr_scheduler_type,
        recipe.rounds,
        warmup_rounds=client.warmup_rounds,
        min_lr_ratio=client.min_lr_ratio or 0.0,
    )


COMPRESS: Mapping[str, Callable[[CompressRecipe], Transform]] = {
    "nonzero": lambda r: nonzero(),
    "top_k": lambda r: top_k(_given(r.share)),
    "random_k": lambda r: random_k(_given(r.share), unbiased=not r.error_feedback),
    "low_rank": lambda r: low_rank(r.low_rank_r or 4),
    "float16": lambda r: cast("float16"),
    "bfloat16": lambda r: cast("bfloat16"),
    "quantize": lambda r: quantize(4 if r.bits == 4 else 8, block_size=r.block_size),
    "zstd": lambda r: zstd(),
}

ADAPTERS: Mapping[str, Callable[[Base, AdapterRecipe], Adapter]] = {
    "lora": lora_of,
    "dora": lora_of,
    "ia3": ia3_of,
    "prompt_tuning": prompt_of,
    "p_tuning": p_tuning_of,
    "prefix_tuning": prefix_of,
    "full": full_of,
    "last_layers": last_layers_of,
    "bottleneck": bottleneck_of,
    "seed_space": seed_space_of,
}

CLIENTS: Mapping[str, Callable[[Recipe, int], ClientUpdate]] = {
    "sgd": sgd_of,
    "scaffold": scaffold_of,
    "mezo": mezo_of,
    "zo": zo_of,
}


def adapter_of(base: Base, recipe: Recipe) -> Adapter:
    adapter = ADAPTERS[recipe.adapter.kind](base, recipe.adapter)
    if recipe.runtime.lora_kernel == "triton":
        adapter = with_triton(adapter)
    if recipe.runtime.gradient_checkpointing:
        adapter = with_recompute(adapter)
    if recipe.runtime.activation_offload:
        adapter = with_activation_offload(adapter)
    if recipe.runtime.activation_cache_gb is not None:
        adapter = with_activation_cache(adapter, int(recipe.runtime.activation_cache_gb * 1e9))
    if recipe.data.type == "preference":
        loss = recipe.dpo
        adapter = dpo(
            adapter,
            beta=_given(loss.beta),
            loss_type=loss.loss_type or "sigmoid",
            label_smoothing=loss.label_smoothing or 0.0,
        )
    if recipe.client.kind != "scaffold":
        return adapter
    trainable = recipe.client.trainable
    return with_control(adapter, lambda name: trainable == "all" or trainable in name)


# ---- what a run starts from ------------------------------------------------------------------------------------------


def start_folder(place: str) -> Path:
    """The LoRA folder of `start_from`: a run's adapter, or the folder itself.

    Raises:
        UserError: there is none.
    """
    given = Path(place).expanduser()
    for folder in (given, given / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise UserError(
        f"start_from {place}: " + ("there is no adapter in it" if given.is_dir() else "there is no such folder"),
        hint=f"fedloom run --resume {place}"
        if (given / "recipe.yaml").is_file()
        else "a finished run, or the folder of a LoRA adapter (adapter_config.json and adapter_model.safetensors)",
        code="adapter.start",
    )


def started(base: Base, recipe: Recipe) -> Base:
    """The base with what the run starts from merged into its weights.

    Raises:
        UserError: there is no such adapter, it is no LoRA adapter, or not for this model.
    """
    if recipe.start_from is None:
        return base
    folder = start_folder(recipe.start_from)
    made_for = starting.merge_into(base.model, folder)
    logger.info("start_from %s: merged into %d layers", folder, len(made_for))
    return base


def start_digest(recipe: Recipe) -> str | None:
    """Of the adapter that the run starts from, so that a resumed run is sure to have the same model."""
    return None if recipe.start_from is None else starting.digest_of(start_folder(recipe.start_from))


def check_start(recipe: Recipe, adapter: Adapter) -> None:
    """What is trained must be on the layers of what it starts from, so that one adapter can hold both.

    Raises:
        UserError: it is not.
    """
    if recipe.start_from is None:
        return
    kind: Any = adapter
    under = set(starting.read_factors(start_folder(recipe.start_from)))
    on = set(kind.sites)
    if on != under:
        names = sorted({name.rsplit(".", 1)[-1] for name in under})
        raise UserError(
            f"start_from {recipe.start_from} is on {len(under)} layers, the adapter on {len(on)}, and they are not the "
            f"same ({sorted(on ^ under)[0]}, ...)",
            hint=f"adapter.lora_target_modules=[{', '.join(names)}]",
            code="adapter.start",
        )


def export_adapter(adapter: Adapter, recipe: Recipe, tree: Tree, folder: Path) -> None:
    """Write an adapter for the model that the recipe names, with what the run started from in it."""
    adapter.export(tree, folder)
    if recipe.start_from is not None:
        starting.write_stacked(folder, start_folder(recipe.start_from))


def algorithm_of(
    recipe: Recipe, arm: str = "federated", *, pieces: int = 1, population_weight: float | None = None
) -> Algorithm:
    """The composition of one arm. `local` never averages; `global` is the same work done by one client.

    Args:
        pieces: in how many passes the global arm works off a batch (see `global_pieces`).
        population_weight: see `population_weight_of`; only a server that adds uploads up needs it.

    Raises:
        UserError: the parts do not compose; every reason is named.
    """
    if arm in ("local", "global"):  # nothing is sent, so nothing is kept from being sent
        kind = recipe.client.kind if recipe.client.kind in ZEROTH_DEFAULTS else "sgd"
        plain = {"kind": kind, "trainable": "all", "shared": "all", "optimizer_state": "fresh"}
        averaged = {"kind": "mean", "weighting": "data"}
        recipe = recipe.model_copy(
            update={
                "client": recipe.client.model_copy(update=plain),
                "aggregate": recipe.aggregate.model_copy(update=averaged),
            }
        )
    client = CLIENTS[recipe.client.kind](recipe, pieces)
    if arm == "local":
        return Algorithm(local_only(client), mean(), replace())
    if arm == "global":
        return Algorithm(client, mean(), replace())
    compress = tuple(COMPRESS[kind](recipe.compress) for kind in recipe.compress.up)
    if recipe.compress.error_feedback:
        client = error_feedback(client, compress)
    return Algorithm(
        client,
        aggregate_of(recipe, population_weight),
        SERVERS[recipe.server.kind](recipe.server),
        compress=compress,
        downlink=tuple(COMPRESS[kind](recipe.compress) for kind in recipe.compress.down),
        uniform_weight=recipe.aggregate.weighting == "uniform",
    )


def aggregate_of(recipe: Recipe, population_weight: float | None) -> Aggregate:
    if recipe.client.kind == "scaffold":
        return scaffold(population_weight)
    if recipe.aggregate.weighting == "loss":
        return q_fedavg(_given(recipe.aggregate.fair_q), recipe.client.learning_rate)
    return AGGREGATES[recipe.aggregate.kind](recipe)


def population_weight_of(recipe: Recipe, federation: Federation) -> float:
    """The weight of all clients together, in the cohort or not: how many there are, or their training rows."""
    if recipe.aggregate.weighting == "uniform":
        return float(len(federation.clients))
    return float(federation.sizes("train").sum())


def rank_of(recipe: Recipe, client: str) -> int | None:
    """The client's own LoRA rank, drawn from the seed and its id; None is everyone's."""
    mix = RANK_MIXES.get(recipe.adapter.client_ranks or "same")
    if mix is None:
        return None
    ranks = [max(1, int(_given(recipe.adapter.lora_r)) // share) for share in (8, 4, 2, 1)]
    draw = random.Random(seed_of(recipe.seed, 0, client, "rank"))
    return draw.choices(ranks, mix)[0]


# ---- who takes part --------------------------------------------------------------------------------------------------


def population_of(federation: Federation, recipe: Recipe, arm: str) -> Clients:
    """The clients of an arm.

    The global arm is one client with the pooled rows, which makes as many steps a round as a client does, with batches
    as large as those of the whole cohort together: the same rounds, the same steps and the same number of samples.
    """
    size = recipe.client.per_device_train_batch_size * recipe.client.gradient_accumulation_steps
    steps, epochs = recipe.local_steps, recipe.local_epochs
    if arm != "global":
        return population(federation, batch_size=size, seed=recipe.seed, num_steps=steps, num_epochs=epochs)
    if steps is None:
        each = -(-federation.sizes("train") // size) * (epochs or 1)
        steps = max(1, round(int(each.sum()) / len(each)))
    pooled = ClientData(POOLED, *(federation.pooled(part) for part in ("train", "validation", "test")))
    width = uploads_per_round(recipe, len(federation.clients))
    pad_id = pad_id_of(federation.tokenizer)
    return Clients({POOLED: pooled}, pad_id, size * width, recipe.seed, steps, paired=federation.paired)


def samples_of_a_local_model(federation: Federation, recipe: Recipe) -> int:
    """Samples that a model of the local arm sees in the whole run: the mean over clients."""
    clients = population_of(federation, recipe, "local")
    return round(sum(clients.examples_seen(client, recipe.rounds) for client in clients.ids) / len(clients.ids))


def global_pieces(recipe: Recipe, federation: Federation, room: Room) -> int:
    """Passes in which the global arm works off a cohort's batch: as many as the federated arm has blocks of clients."""
    cohort = uploads_per_round(recipe, len(federation.clients))
    return -(-cohort // clients_in_a_pass(recipe, room))


def clients_in_a_pass(recipe: Recipe, room: Room) -> int:
    """Of the federated arm."""
    return room.width if recipe.runtime.kind in ("batched", "buffered") else 1


def clients_per_round(recipe: Recipe, num_clients: int) -> int | None:
    """Size of a cohort; None is everyone. A share is rounded up, so that it never asks for nobody."""
    share = recipe.clients_per_round
    return max(1, math.ceil(share * num_clients)) if isinstance(share, float) else share


def uploads_per_round(recipe: Recipe, num_clients: int) -> int:
    """Of the federated arm: one per client of the cohort, or as many as fill the buffer.

    Raises:
        UserError: the buffer is larger than the number of clients that train at once.
    """
    cohort = clients_per_round(recipe, num_clients) or num_clients
    if recipe.runtime.kind != "buffered":
        return cohort
    size = recipe.runtime.buffer_size or -(-cohort // 2)
    if size > cohort:
        raise UserError(
            f"runtime.buffer_size {size}, but {cohort} clients train at once: at most {cohort}",
            hint=f"runtime.buffer_size={cohort}, or more clients_per_round",
            code="recipe.buffer_size",
        )
    return size


def sampling_of(recipe: Recipe, arm: str, num_clients: int) -> Sampling:
    """Local training is for everyone in every round; the pool is one client."""
    if arm == "federated" and recipe.runtime.kind == "buffered":  # candidates, of whom some are under way
        at_once = clients_per_round(recipe, num_clients) or num_clients
        return Sampling(min(num_clients, at_once + uploads_per_round(recipe, num_clients)))
    return Sampling(clients_per_round(recipe, num_clients) if arm == "federated" else None)


def personal_of(
    recipe: Recipe, algorithm: Algorithm, params: Tree, num_clients: int, place: Path
) -> Mapping[str, Tree]:
    """Where the clients' personal state will lie, nothing in it yet: in memory, or in the file `place`."""
    kind = recipe.runtime.personal_state
    each = sum(leaf.numel() * leaf.element_size() for leaf in algorithm.client.personal(params).values())
    if kind == "memory" or not each or recipe.runtime.kind == "buffered":
        return {}
    if kind == "auto" and each * num_clients <= PERSONAL_BYTES:
        return {}
    place.parent.mkdir(parents=True, exist_ok=True)
    device = next(iter(params.values())).device
    return Store(place, device).cut(0) if not place.exists() else Store(place, device).at(0)


# ---- how it is mapped to the machine ---------------------------------------------------------------------------------


def _by_one(lead: Lead, train: Callable[..., Trained]) -> Callable[..., Trained]:
    return lambda *args: lead.alone(lambda: train(*args))


def runtime_of(
    recipe: Recipe,
    federation: Federation,
    arm: str,
    base: Base,
    make_base: Callable[[], Base],
    evaluations: Mapping[str, Evaluation],
    room: Room | None = None,
    lead: Lead | None = None,
) -> Runtime:
    """The runtime of an arm. Only the federated arm loses clients or sends messages.

    `room` is what a run has found out of its memory; without it each arm finds out by itself. With `lead` its team
    shares the work; but for the global arm's training, which is one client's.
    """
    kind = recipe.runtime.kind
    room = room or Room(width_of(recipe, federation, base))
    if lead is not None:
        shared = distributed(
            lead, arm, Room(1) if kind == "sequential" else room, evaluation_load=evaluation_load_of(federation)
        )
        runtime = Runtime(_by_one(lead, batched(room).train), shared.evaluate) if arm == "global" else shared
    elif kind == "loopback" and arm == "federated":
        runtime = loopback(
            {
                client: ClientSite(
                    client,
                    lambda: (algorithm_of(recipe), adapter_of(make_base(), recipe)),
                    lambda round, client=client: population_of(federation, recipe, arm).open(client, round),  # type: ignore[misc]
                    evaluations,
                    rank_of(recipe, client),
                ).serve
                for client in federation.clients
            }
        )
    elif kind == "buffered" and arm == "federated":
        speed_of, number = speeds(recipe.runtime.client_speeds, recipe.seed), len(federation.clients)
        runtime = buffered(
            room,
            buffer_size=uploads_per_round(recipe, number),
            concurrency=clients_per_round(recipe, number) or number,
            duration=lambda client: speed_of(client.id) * len(client.batches),
            staleness_exponent=_given(recipe.runtime.staleness_exponent),
        )
    elif kind == "sequential" or kind == "loopback":
        runtime = sequential()
    else:
        runtime = batched(room)
    if arm == "federated" and recipe.adapter.client_ranks in RANK_MIXES:
        runtime = with_ranks(runtime, lambda client: rank_of(recipe, client))
    share = recipe.runtime.client_dropout
    return with_dropout(runtime, share) if share and arm == "federated" else runtime


def sharded(team: Team, adapter: Adapter, recipe: Recipe) -> Shards:
    """The base's blocks in parts, of which this process keeps its own.

    Raises:
        UserError: the weights are no plain numbers, or the model has no single stack of blocks.
    """
    blocks = decoder_blocks(adapter.model)
    packed = [
        name for name, block in blocks.items() if not all(leaf.is_floating_point() for leaf in block.parameters())
    ]
    if packed:
        raise UserError(
            f"runtime.shard_base parts plain weights, and {packed[0]} holds quantised ones",
            hint="runtime.shard_base=false: a quantised base is small, or load it unquantised",
            code="shards.quantised",
        )
    params = adapter.init(recipe.seed)
    return shard(team, adapter, params, blocks.values(), offload=recipe.runtime.shard_offload)


def evaluation_load_of(federation: Federation) -> Callable[[str, str], float]:
    """Tokens that a client's evaluation of some name goes through; those of the common test set are alike."""
    parts = {"validation": "validation", "own": "test"}

    def load(evaluation: str, client: str) -> float:
        part = parts.get(evaluation)
        if part is None:
            return 1.0
        examples = getattr(federation.clients[client], part)
        return 1.0 + float((Pairs(examples) if federation.paired else examples).lengths.sum())

    return load


def width_of(recipe: Recipe, federation: Federation, base: Base) -> int:
    """Clients in one pass: as asked for, or as many as fill a pass with tokens."""
    width = recipe.runtime.clients_per_batch
    if isinstance(width, int):
        return width
    train = federation.pooled("train")
    lengths = 2 * Pairs(train).lengths if federation.paired else train.lengths
    typical = float(lengths.mean()) if len(lengths) else 1.0
    hidden_size = int(getattr(base.model.config, "hidden_size", 1024))
    room = CPU_NUMBERS_PER_PASS // hidden_size if base.device.type == "cpu" else GPU_TOKENS_PER_PASS
    wanted = int(room // max(1.0, typical * recipe.client.per_device_train_batch_size))
    if recipe.adapter.kind in ("full", "last_layers"):
        layers = int(getattr(base.model.config, "num_hidden_layers", 0)) or 1
        share = 1.0 if recipe.adapter.kind == "full" else min(1.0, (recipe.adapter.trainable_layers or 2) / layers)
        wanted = min(wanted, int(WEIGHTS_PER_PASS / (share * base.num_parameters)))
    return max(1, min(wanted, len(federation.clients)))


def message_bytes(
    algorithm: Algorithm, adapter: Adapter, state: State, client: Client, cohort: tuple[str, ...], num_steps: int = 1
) -> tuple[int, int]:
    """(up, down): bytes of one client's messages in a round of so many steps, by the codec, found without training."""
    site = Site(state.seed, state.round, client.id, cohort)
    narrowed = {name: leaf[None] for name, leaf in adapter.narrow(state.params, client).items()}
    personal = {name: leaf[None] for name, leaf in algorithm.client.personal(state.params).items()}
    work = algorithm.client.init(narrowed, personal, [site])
    delta_C, _ = algorithm.client.finish(narrowed, work)
    told = TRAINING_METRICS if scaling_in(work) is None else (*TRAINING_METRICS, SKIPPED)
    # How small some messages are depends on what is in them: numbers like those of a first step stand for them.
    draw = torch.Generator().manual_seed(0)
    delta = {name: leaf[0] + torch.randn(leaf[0].shape, generator=draw).to(leaf) for name, leaf in delta_C.items()}
    if hasattr(adapter, "num_seeds"):  # a step changes one number
        delta = {name: leaf * (torch.arange(len(leaf)) < num_steps).to(leaf) for name, leaf in delta.items()}
    payload = sides.client_payload(algorithm, state.params, delta, client.weight, site)
    up = sides.upload_bytes(payload, client.weight, dict.fromkeys(told, 0.0))
    return up, sides.broadcast_bytes(state, sides.broadcast_payload(algorithm, state), site)


TRAINING_METRICS = ("tokens", "padded_tokens", "examples", "steps", "loss_sum", "target_tokens", "seconds")


def _given(value: float | None) -> float:
    if value is None:
        raise ValueError("a validated recipe has every setting of its optimiser")
    return value


def _betas(recipe: ClientRecipe) -> dict[str, Any]:
    return {
        "beta1": _given(recipe.adam_beta1),
        "beta2": _given(recipe.adam_beta2),
        "epsilon": _given(recipe.adam_epsilon),
    }


def _server_betas(recipe: ServerRecipe) -> dict[str, Any]:
    return {
        "beta1": _given(recipe.server_beta1),
        "beta2": _given(recipe.server_beta2),
        "tau": _given(recipe.server_tau),
    }
