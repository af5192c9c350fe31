"""The blocks of a recipe, as pydantic models: with the keys of `Recipe`, the only list of keys. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fedloom.study.settings import (
    BEST_BY,
    COLUMN_NAMES,
    DEFAULT_CLIENTS,
    DEFAULT_SHARDS,
    DEFAULT_TEST_SHARE,
    DEFAULT_VAL_SHARE,
    AdapterKind,
    ClientOptim,
    ClientSpeeds,
    Compression,
    DownCompression,
    LossType,
    RankMix,
    RuntimeKind,
    ServerOptim,
    SplitKind,
)


class Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class DataRecipe(Block):
    """Where the rows come from and how they become tokens."""

    name: str | None = Field(
        None,
        description="A data set of the catalogue (`fedloom ls data`), `fed-dolly` say, which brings its columns, its "
        "split and, where it is published with any, its test rows. `local` is any file.",
    )
    path: str = Field(
        "",
        description="A json, jsonl, csv or parquet file, a folder of them, a Hugging Face data set id, or "
        "`builtin:skills`, `builtin:arith` or `builtin:code`. Beside data.name: a copy of that set. Required without; "
        "with model `builtin` it is `builtin:skills`. A name of the catalogue here is taken as data.name.",
    )
    test_path: str | None = Field(
        None, description="Rows to test on, from another file or data set. Without it test_set_size is set aside."
    )
    type: Literal["auto", "alpaca", "chat", "prompt_completion", "completion", "preference"] = Field(
        "auto",
        description="What a row is. `auto` looks at the columns and says what it took. `preference` is a chosen and a "
        "rejected answer, compared by the loss of `dpo`; the others are answers to imitate. A built-in task as "
        "`preference` has typical mistakes to reject.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Our name of a column: its name in the file, for example `{input: context, output: response}`. "
        f"Our names are {', '.join(COLUMN_NAMES)}.",
    )
    max_length: Annotated[int, Field(ge=8)] = Field(
        1024, description="Longest example in tokens, prompt and answer together; what is longer is cut and counted."
    )
    chat_template: Literal["auto", "alpaca", "tokenizer"] = Field(
        "auto",
        description="`tokenizer` is the model's own template, `alpaca` the Stanford-Alpaca layout; `auto` takes the "
        "tokenizer's where it has one.",
    )
    val_set_size: Annotated[int, Field(strict=True, ge=0)] | Annotated[float, Field(ge=0, lt=1)] = Field(
        DEFAULT_VAL_SHARE,
        description="Validation rows: a share below 1 of each client's, or a whole number over all clients, in "
        "proportion to what they have. Built-in tasks with the natural split bring their own.",
    )
    test_set_size: Annotated[int, Field(strict=True, ge=0)] | Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None,
        description=f"Test rows, as val_set_size. Default {DEFAULT_TEST_SHARE} without test_path. Built-in tasks bring "
        "their own, and so do named sets that are published with test rows, unless this is given.",
    )
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="Read no more than this many rows.")
    train_on_inputs: bool = Field(False, description="Put the loss on the prompt as well as on the answer.")
    cache: bool = Field(
        True, description="Keep the prepared data for the next time ($FEDLOOM_CACHE, 20 GB): fedloom cache shows it."
    )

    @property
    def label(self) -> str:
        """What the rows are called in a sentence."""
        return self.path or self.name or ""

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        unknown = [name for name in columns if name not in COLUMN_NAMES]
        if unknown:
            raise ValueError(
                f"no such column name: {', '.join(unknown)}; the left side is one of {', '.join(COLUMN_NAMES)}, "
                "the right side is the file's own name"
            )
        return columns


class SplitRecipe(Block):
    """Who holds which rows."""

    kind: SplitKind = Field(
        "iid",
        description="`iid` deals rows at random; `dirichlet` skews categories by alpha; `shards` sorts by category, "
        "cuts equal shards and deals them; `quantity_skew` skews sizes by alpha; `by_category` gives each client its "
        "categories; `by_column` makes one client per value of a column; `files` one per file of a folder; `natural` "
        "is what a built-in task brings (its default).",
    )
    clients: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description=f"Number of clients. Default {DEFAULT_CLIENTS} for iid, dirichlet, shards and quantity_skew, else "
        "what the data has; fewer than categories, values or files, and those are dealt round robin; a built-in task "
        "loses its last ones.",
    )
    alpha: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Concentration: 0.1 is very skewed, 100 nearly even. Only for dirichlet and quantity_skew, which "
        "need it.",
    )
    column: str | None = Field(
        None, description="The column that by_column splits by, and dirichlet and shards in place of category."
    )
    shards_per_client: Annotated[int, Field(ge=1)] | None = Field(
        None, description=f"Shards each client gets. Default {DEFAULT_SHARDS}. Only for shards."
    )
    min_rows: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Categories, values or files with fewer rows are left out, and counted. Only for by_category, "
        "by_column and files.",
    )


class AdapterRecipe(Block):
    """What is trained on top of the frozen model."""

    kind: AdapterKind = Field(
        "lora",
        description="The kind of adapter: `lora` on layers, `dora` (LoRA of the direction, and a trained magnitude), "
        "`ia3` (a vector that rescales keys, values and the inside of the feed-forward), or virtual tokens before "
        "every text: `prompt_tuning`, `p_tuning` (made by a small encoder), `prefix_tuning` (keys and values in every "
        "layer); or the model's own weights: `full` (all of them), `last_layers` (those of the highest blocks), "
        "`seed_space` (all of them, along directions that seeds stand for: FedKSeed); or new "
        "parts: `bottleneck` (two small layers behind parts of each block).",
    )
    lora_r: Annotated[int, Field(ge=1)] | None = Field(None, description="Rank. Default 8. Only for lora, dora.")
    lora_alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="The update is scaled by lora_alpha / lora_r. Default 16. Only for lora, dora."
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None,
        description="Dropout in front of A while training; draws differ with the size of a client batch. Default 0. "
        "Only for lora, dora.",
    )
    lora_target_modules: Annotated[list[str], Field(min_length=1)] | Literal["auto", "all-linear"] | None = Field(
        None,
        description="Names of linear modules, `all-linear`, or `auto`: PEFT's choice for the architecture. Default "
        "auto. Only for lora, dora.",
    )
    client_ranks: RankMix | None = Field(
        None,
        description="Ranks of clients: `same` is lora_r for all; `heavy_tail` gives 60, 25, 10 and 5 % of them an "
        "eighth, a quarter, half and all of lora_r, `normal` 15, 35, 35 and 15 %, `uniform` a quarter each. Default "
        "same. Only for lora, dora.",
    )
    use_rslora: bool | None = Field(
        None,
        description="The update is scaled by lora_alpha / sqrt(lora_r), so that its size does not fall with the rank. "
        "Default false. Only for lora, dora.",
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] | None = Field(
        None,
        description="Other ranks of some layers, for example `{v_proj: 16}`: the end of a layer's name, or a regular "
        "expression for it, as PEFT has it. Only for lora, dora.",
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        None, description="Other alphas of some layers, as rank_pattern. Only for lora, dora."
    )
    bias: Literal["none", "lora_only", "all"] | None = Field(
        None,
        description="Which of the model's own biases are trained and sent as well: none, those of the adapted layers, "
        "or all. Default none. Only for lora, dora.",
    )
    ia3_target_modules: Annotated[list[str], Field(min_length=1)] | Literal["auto", "all-linear"] | None = Field(
        None,
        description="Names of linear modules, `all-linear`, or `auto`: PEFT's choice for the architecture. Default "
        "auto. Only for ia3.",
    )
    ia3_feedforward_modules: Annotated[list[str], Field(min_length=1)] | Literal["auto", "none"] | None = Field(
        None,
        description="Those of ia3_target_modules whose input is rescaled in place of their output. Default auto: "
        "PEFT's choice. Only for ia3.",
    )
    num_virtual_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Default 20. Only for prompt_tuning, p_tuning, prefix_tuning."
    )
    prompt_tuning_init_text: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="A text whose tokens the prompt begins with; without it they are drawn from the vocabulary. Only "
        "for prompt_tuning.",
    )
    encoder_reparameterization_type: Literal["mlp", "lstm"] | None = Field(
        None, description="The encoder of the virtual tokens. Default mlp. Only for p_tuning."
    )
    encoder_hidden_size: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Of the encoder. Default: the model's hidden size. Only for p_tuning."
    )
    trainable_layers: Annotated[int, Field(ge=1)] | None = Field(
        None, description="How many of the highest blocks are trained. Default 2. Only for last_layers."
    )
    trainable_extra: Literal["none", "norm", "norm_and_head"] | None = Field(
        None,
        description="What is trained above the blocks: the final norm, or that and the head. Default none. Only for "
        "last_layers.",
    )
    bottleneck_size: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Width of the adapters. Default: the hidden size / reduction_factor. Only for bottleneck."
    )
    reduction_factor: Annotated[float, Field(gt=0)] | None = Field(
        None, description="In place of bottleneck_size. Default 16. Only for bottleneck."
    )
    non_linearity: Literal["relu", "gelu", "silu", "tanh"] | None = Field(
        None, description="Between the two layers. Default relu. Only for bottleneck."
    )
    bottleneck_after: Literal["attention_and_mlp", "mlp"] | None = Field(
        None,
        description="Behind what of each block: `attention_and_mlp` (Houlsby et al. 2019) or `mlp` (Pfeiffer et al. "
        "2021). Default attention_and_mlp. Only for bottleneck.",
    )
    num_seeds: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Directions that the weights may move along; a number for each travels. Default 4096, with method "
        "fedkseed_pro 1024. Only for seed_space.",
    )
    seed_sampling: Literal["uniform", "magnitude"] | None = Field(
        None,
        description="How clients draw seeds: `magnitude` prefers those along which the loss has been steep "
        "(FedKSeed-Pro); two more numbers for each seed travel. Default uniform. Only for seed_space.",
    )
    direction_seed: Annotated[int, Field(ge=0, lt=2**63)] | None = Field(
        None, description="What the directions are drawn from. Default: the run's seed. Only for seed_space."
    )


class ClientRecipe(Block):
    """One client's work in one round."""

    kind: Literal["sgd", "scaffold", "mezo", "zo"] = Field(
        "sgd",
        description="The local algorithm: steps of an optimiser on own batches; `scaffold` corrects each of them by "
        "control variates, which travel both ways beside the parameters; `mezo` takes two losses along a random "
        "direction in place of the gradient, `zo` along the directions of adapter.kind seed_space.",
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        2e-4,
        description="Peak learning rate. Default 2e-4, with adapter.kind full or last_layers 2e-5, ia3 3e-3, with "
        "methods fedmezo 1e-4, fedkseed and fedkseed_pro 1e-6.",
    )
    optim: ClientOptim = Field("adamw", description="See optimizer_state for what it remembers.")
    optimizer_state: Literal["fresh", "kept"] = Field(
        "fresh",
        description="`fresh`: the optimiser starts anew in each round. `kept`: its moments stay with the client, as in "
        "DiLoCo. The local and global arms start anew.",
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="Default 0.9. Only for momentum.")
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Decoupled for adamw, added to the gradient for sgd and momentum. Default 0. Only for these.",
    )
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Default 0.9. Only for adamw, adam, yogi."
    )
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Default 0.999. Only for adamw, adam, yogi."
    )
    adam_epsilon: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Default 1e-8, yogi 1e-3, adagrad 1e-10. Only for adamw, adam, yogi, adagrad."
    )
    per_device_train_batch_size: Annotated[int, Field(ge=1)] = Field(
        4, description="Examples of one client in one forward and backward pass."
    )
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = Field(
        1, description="Passes per optimiser step: a step sees batch size x this many examples."
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="Each client's gradient is clipped to this norm; `null` is off."
    )
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Over all rounds of the run; it does not restart in each round."
    )
    warmup_rounds: Annotated[int, Field(ge=0)] = Field(0, description="Rounds in which the learning rate rises.")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="The end of the schedule as a share of the peak. Default 0. Only for linear and cosine."
    )
    zo_eps: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="How far from where a client is the two losses are taken. Default 1e-3 for mezo, 5e-4 for zo. Only "
        "for these.",
    )
    prox_mu: Annotated[float, Field(ge=0)] = Field(
        0.0, description="FedProx: adds prox_mu / 2 x squared distance from the round's start to the loss."
    )
    trainable: Literal["all", "lora_A", "lora_B", "alternate"] = Field(
        "all",
        description="The factors that clients train and send: FFA-LoRA is `lora_B`, RoLoRA `alternate` (B, A in turn). "
        "The local and global arms train all.",
    )
    shared: Literal["all", "lora_A", "lora_B"] = Field(
        "all",
        description="The factors that are sent and averaged; the others stay with the client. FedSA-LoRA: `lora_A`.",
    )


class DpoRecipe(Block):
    """The loss on pairs of answers: only with rows of type `preference`. The reference is the base as it is loaded."""

    loss_type: LossType | None = Field(
        None,
        description="`sigmoid` is DPO as published; `sigmoid_norm` the same on log-likelihoods per token; `hinge` and "
        "`ipo` (per token). Default sigmoid.",
    )
    beta: Annotated[float, Field(gt=0)] | None = Field(
        None, description="How strongly the model is held to the base. Default 0.1, sigmoid_norm 2."
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = Field(
        None,
        description="The share of pairs taken to be the wrong way round. Default 0. Only for sigmoid and sigmoid_norm.",
    )


class AggregateRecipe(Block):
    """What the sum of uploads means."""

    kind: Literal["mean", "fednova", "fedexp", "flora", "flex_lora", "fedex_lora", "het_lora"] = Field(
        "mean", description="The rule; docs/papers.md says what each makes of LoRA's factors."
    )
    norm_weighted: bool | None = Field(
        None,
        description="Weigh clients by the norm of what they learnt, not by rows. Default true. Only for het_lora.",
    )
    exp_epsilon: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Keeps the server's step small where clients' changes nearly cancel, in units of the squared norm "
        "of their mean. Default 1e-3. Only for fedexp.",
    )
    weighting: Literal["data", "uniform", "loss"] = Field(
        "data",
        description="`data` weighs a client by its number of training rows, `uniform` all the same; `loss` is "
        "q-FedAvg: by rows and by the power fair_q of the loss that the client's round begins with.",
    )
    fair_q: Annotated[float, Field(ge=0)] | None = Field(
        None, description="0 is FedAvg; the larger, the more even the clients. Default 1. Only for weighting loss."
    )


class CompressRecipe(Block):
    """How messages are made smaller."""

    up: list[Compression] = Field(
        default_factory=list,
        description="What clients' messages go through, in this order: one of `nonzero` (lossless), `top_k`, "
        "`random_k`, `low_rank`; then one of `float16`, `bfloat16`, `quantize`; then `zstd`.",
    )
    down: list[DownCompression] = Field(
        default_factory=list,
        description="The same for the broadcast, without the first kind: clients need every number.",
    )
    bits: Annotated[int, Field(ge=4, le=8)] | None = Field(None, description="8 or 4. Default 8. Only for quantize.")
    block_size: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Numbers that share a scale; default the whole tensor. Only for quantize."
    )
    share: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Of the numbers that are sent. Default 0.1. Only for top_k and random_k."
    )
    low_rank_r: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Rank of what is sent of a matrix. Default 4. Only for low_rank."
    )
    error_feedback: bool | None = Field(
        None,
        description="Clients send later what compression left out. Default true for top_k and low_rank, else false. "
        "Only where something is lost.",
    )


class ServerRecipe(Block):
    """From the parameters towards what the clients propose."""

    kind: Literal["replace", "optimize"] = Field(
        "replace", description="Take the proposal, or step towards it with an optimiser."
    )
    server_optim: ServerOptim | None = Field(None, description="Required for optimize.")
    server_learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Default 1.0 for momentum, 0.7 for nesterov, 0.01 for adam, yogi and adagrad. Only for optimize.",
    )
    server_momentum: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Default 0.9. Only for momentum, nesterov."
    )
    server_beta1: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Default 0.9, adagrad 0. Only for adam, yogi, adagrad."
    )
    server_beta2: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Default 0.99. Only for adam, yogi."
    )
    server_tau: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Added to the denominator. Default 1e-3. Only for adam, yogi, adagrad."
    )


class RuntimeRecipe(Block):
    """How clients are mapped to the machine: but for `buffered` that changes speed and memory, never the result."""

    kind: RuntimeKind = Field(
        "batched",
        description="`batched` trains several clients in one pass; `sequential` one after the other; `loopback` sends "
        "every payload through the wire format to client objects with their own model. `buffered` is asynchronous "
        "(FedBuff): a round ends when buffer_size uploads have arrived, and clients_per_round of them train at once.",
    )
    clients_per_batch: Annotated[int, Field(ge=1)] | Literal["auto", "fastest"] | None = Field(
        None,
        description="Clients in one pass. Default `auto`: by a rule, and no more than memory holds. `fastest` tries "
        "some, where the run is long enough, and keeps to what it took; the last digits then depend on the trial. "
        "Only for batched, buffered.",
    )
    buffer_size: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Uploads that end a round. Default half of the clients that train at once. Only for buffered.",
    )
    staleness_exponent: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="An upload that is tau rounds late counts (1 + tau) to minus this. Default 0.5. Only for buffered.",
    )
    client_speeds: ClientSpeeds = Field(
        "steps",
        description="Simulated seconds of a client's local step, for `simulated_seconds`: `steps` 1 for all, so that "
        "its number of steps decides; `uniform` 0.5 to 1.5; `lognormal` exp of a standard normal. Drawn once per "
        "client.",
    )
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = Field("auto", description="CPU threads of PyTorch.")
    gradient_checkpointing: bool = Field(
        False,
        description="Keep no activations of the decoder's blocks in training, but run each block again in the backward "
        "pass: much less memory, one more forward pass, the same numbers.",
    )
    activation_offload: bool = Field(
        False,
        description="On a GPU: keep what the backward pass needs of the decoder's blocks in the host's pinned memory, "
        "copied there and back: less memory of the GPU, more traffic, the same numbers. Not with "
        "gradient_checkpointing.",
    )
    lora_kernel: Literal["plain", "triton"] = Field(
        "plain",
        description="What multiplies LoRA's factors: torch's batched products, or Triton's kernels on a CUDA GPU, "
        "forward and backward. Only for LoRA of ranks up to 128. Which is faster: python -m benchmarks.gpu.",
    )
    personal_state: Literal["auto", "memory", "disk"] = Field(
        "auto",
        description="Where clients' personal state lies (own parameters, control variates, residuals, moments): in "
        "memory, or in one file of the run folder. `auto` is memory while that of all clients would take 1 GiB at "
        "most, and always for buffered.",
    )
    shard_base: bool = Field(
        False,
        description="Each of several processes (`--nproc`, torchrun) holds a part of the frozen blocks' weights, which "
        "are put together block by block while they run: less memory, more traffic, the same numbers. Only with "
        "adapter.kind lora.",
    )
    shard_offload: bool = Field(
        False,
        description="On GPUs, with shard_base: the parts wait in the host's pinned memory, and a block's are copied to "
        "the GPUs while it runs (FSDP2's CPU offload).",
    )
    activation_cache_gb: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Where only upper layers are trained: keep up to so many GB of what the frozen blocks below make "
        "of each row, so that a row runs through them once and not in every epoch. `null` keeps nothing.",
    )
    client_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of a round's clients that fail, simulated."
    )


class EvaluateRecipe(Block):
    """What is measured, and when."""

    eval_rounds: Annotated[int, Field(ge=0)] = Field(
        5, description="Validate every so many rounds, besides before the first and after the last; 0 only then."
    )
    score: Literal["auto", "none", "exact", "final_number", "pass_at_1"] = Field(
        "auto", description="How an answer is judged; `auto` is the task's own, or none where nothing is known."
    )
    limit: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Score no more than this many test rows per client; the loss is always on all."
    )
    max_new_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Longest generated answer. Default: the built-in task's own, else 256."
    )
    eval_batch_size: Annotated[int, Field(ge=1)] = Field(16, description="Examples in one pass of evaluation.")
    score_validation: bool = Field(
        False,
        description="Score the validation rows too at each validation, up to limit per client. Done anyway where "
        "best_by is a score.",
    )
    best_by: str | None = Field(
        None,
        description="What makes a checkpoint the best: of the validation rows "
        f"{', '.join(f'`{key}`' for key in BEST_BY)} (a decile is the mean of the worst tenth of the clients), or "
        "`TASK/METRIC` of a benchmark. Default loss where there are validation rows; where there is nothing to choose "
        "by, the last checkpoint is the best.",
    )
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Stop an arm after so many evaluations in a row that are no better by best_by than the best so "
        "far. `null` is off.",
    )
    early_stopping_threshold: Annotated[float, Field(ge=0)] | None = Field(
        None, description="By how much better counts as better. Default 0. Only with early_stopping_patience."
    )
    equal_samples: bool = Field(
        True,
        description="Where `local` is one of the arms: test the federated and the global arm also after the round in "
        "which their model has seen as many samples as one local model sees in the whole run.",
    )
    tasks: list[str] = Field(
        default_factory=list,
        description="Benchmarks that each arm's model is put to at the end, by name: `[gsm8k, mmlu]`.",
    )
    task_paths: dict[str, str] = Field(
        default_factory=dict,
        description="Where a benchmark's published files lie, for example `{gsm8k: test.jsonl}`. Default: below "
        "$FEDLOOM_DATA.",
    )
    task_limit: Annotated[int, Field(ge=1)] | None = Field(
        None, description="No more than this many items of a benchmark (of each subject, where it has subjects)."
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Worked examples before each question. Default: the benchmark's own number."
    )
    task_rounds: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Run the benchmarks every so many rounds as well, and before the first."
    )
    task_clients: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="Where each client has a model of its own (`local`, personalised methods), a benchmark's figure is "
        "their mean: take the models of only so many clients, the first ones.",
    )


class CheckpointRecipe(Block):
    """What is kept to go on from, and what comes out."""

    save_rounds: Annotated[int, Field(ge=1)] = Field(1, description="Save every so many rounds.")
    save_total_limit: Annotated[int, Field(ge=1)] = Field(2, description="Checkpoints kept per arm, besides the best.")
    export: Literal["last", "best"] | None = Field(
        None,
        description="The state of an arm that is tested and written to `adapter/`: after its last round, or the best "
        "one. Default last, with early stopping best. The other one can be had by `--checkpoint`.",
    )
