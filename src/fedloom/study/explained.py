"""What each method, adapter kind and compression does, on which side, in words: a literal table. Imports no torch.

Names are those of `METHODS`, `adapter.kind` and `compress`; a test holds every one of them to have its entry. Numbers,
keys and bytes are not typed here: `fedloom.study.explain` finds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["ADAPTERS_EXPLAINED", "COMPRESS_EXPLAINED", "METHODS_EXPLAINED", "Explained"]


class Explained(NamedTuple):
    """One name, side by side."""

    client: str  # what a client computes in a round
    sends: str  # what travels, both ways
    server: str  # what the server computes of it
    keeps: str  # what each side has from one round to the next
    paper: str  # with the equation or algorithm that is followed


_LOCAL = "local steps of an optimiser that starts anew, from the broadcast, on its own rows"
_CHANGE = "up: the change of what it trained, and its number of rows; down: the parameters"
_NOTHING = "nothing but the parameters at the server"

METHODS_EXPLAINED: Mapping[str, Explained] = {
    "fedavg": Explained(
        _LOCAL,
        _CHANGE,
        "the mean of the changes, weighed by rows, is added to the parameters; on LoRA that is the mean of A and the "
        "mean of B, which is not the mean of B A",
        _NOTHING,
        "McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data, Algorithm 1",
    ),
    "fedprox": Explained(
        f"{_LOCAL}, with prox_mu / 2 times the squared distance from the broadcast added to the loss",
        _CHANGE,
        "as fedavg",
        _NOTHING,
        "Li et al. 2020, Federated Optimization in Heterogeneous Networks, Eq. 2",
    ),
    "fedavgm": Explained(
        _LOCAL,
        _CHANGE,
        "the mean of the changes is a step of gradient descent with momentum",
        "the server: the momentum",
        "Hsu et al. 2019, Measuring the Effects of Non-Identical Data Distribution",
    ),
    "fedadam": Explained(
        _LOCAL,
        _CHANGE,
        "the mean of the changes stands for a gradient, of which Adam makes a step, without bias correction",
        "the server: both moments",
        "Reddi et al. 2021, Adaptive Federated Optimization, Algorithm 2",
    ),
    "fedyogi": Explained(
        _LOCAL,
        _CHANGE,
        "the mean of the changes stands for a gradient, of which Yogi makes a step, without bias correction",
        "the server: both moments",
        "Reddi et al. 2021, Adaptive Federated Optimization, Algorithm 2",
    ),
    "fedadagrad": Explained(
        _LOCAL,
        _CHANGE,
        "the mean of the changes stands for a gradient, of which Adagrad makes a step",
        "the server: the sum of squares, and the first moment",
        "Reddi et al. 2021, Adaptive Federated Optimization, Algorithm 2",
    ),
    "diloco": Explained(
        f"{_LOCAL}: many steps of AdamW, whose moments stay with the client",
        _CHANGE,
        "the mean of the changes is the outer gradient of a Nesterov step",
        "the server: the momentum; a client: its optimiser's moments",
        "Douillard et al. 2023, DiLoCo: Distributed Low-Communication Training of Language Models, Algorithm 1",
    ),
    "scaffold": Explained(
        "local steps along its gradient less its own control variate plus everyone's, which takes the drift away",
        "both ways the parameters and the control variate: twice fedavg's bytes",
        "the mean of the changes is added to the parameters, and that of the control variates, as a share of all "
        "clients, to the common one",
        "a client: its control variate; the server: the common one",
        "Karimireddy et al. 2020, SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, Algorithm 1",
    ),
    "fednova": Explained(
        _LOCAL,
        "up: the change and one number, how much work is behind it; down: the parameters",
        "each change is divided by its work before the mean is taken, and the mean goes as far as the mean work: who "
        "makes more steps pulls no harder",
        _NOTHING,
        "Wang et al. 2020, Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization, "
        "Eq. 12",
    ),
    "fedexp": Explained(
        _LOCAL,
        "up: the change; down: the parameters",
        "a step along the mean of the changes, at least as long as it, and longer where they disagree: half of their "
        "mean squared length over that of the mean",
        _NOTHING,
        "Jhunjhunwala et al. 2023, FedExP: Speeding Up Federated Averaging via Extrapolation, Algorithm 1",
    ),
    "qfedavg": Explained(
        f"its loss at the round's start, then {_LOCAL}",
        "up: the change and one number, that loss; down: the parameters",
        "clients with a higher loss weigh more (its power q), and the length of the step needs no tuning",
        _NOTHING,
        "Li et al. 2020, Fair Resource Allocation in Federated Learning, Algorithm 2",
    ),
    "fedbuff": Explained(
        f"{_LOCAL}, each at its own speed on a simulated clock",
        "up: the change, when it is ready; down: the parameters of that moment",
        "the first changes to arrive fill a buffer; their mean, with stale ones discounted, is a step",
        "the server: the buffer",
        "Nguyen et al. 2022, Federated Learning with Buffered Asynchronous Aggregation, Algorithm 1",
    ),
    "ffa_lora": Explained(
        f"{_LOCAL}, of B alone; A stays at its first values, which everyone has",
        "up: the change of B: half of LoRA's numbers where layers are square; down: the parameters",
        "the mean of B, and so the mean of B A: exact",
        _NOTHING,
        "Sun et al. 2024, Improving LoRA in Privacy-preserving Federated Learning",
    ),
    "rolora": Explained(
        f"{_LOCAL}, of B in one round and of A in the next",
        "up: the change of one factor; down: the parameters",
        "the mean of the factor that was trained; the other is the same for all, so it is the mean of B A: exact",
        _NOTHING,
        "Chen et al. 2024, Robust Federated Finetuning of Foundation Models via Alternating Minimization of LoRA",
    ),
    "fedsa_lora": Explained(
        f"{_LOCAL}, of both factors, from the common A and its own B",
        "up: the change of A; down: the parameters",
        "the mean of A",
        "a client: its B; each is evaluated with its own",
        "Guo et al. 2025, Selective Aggregation for Low-Rank Adaptation in Federated Learning, Algorithm 1",
    ),
    "flora": Explained(
        _LOCAL,
        "up: the changes of both factors at the client's rank; down: new factors, and all that was ever merged, as "
        "factors or whole where that is smaller: it grows with the rounds",
        "the clients' products B A, weighed, are merged into the frozen weights: exact, whatever the ranks; A is drawn "
        "anew and B is zero",
        "all: what was merged into the base",
        "Wang et al. 2024, FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations, "
        "Eq. 5 and 6",
    ),
    "flex_lora": Explained(
        f"{_LOCAL}, at its own rank",
        "up: the changes of both factors at the client's rank; down: the factors",
        "the mean of the products B A, cut to the adapter's rank by a singular value decomposition",
        _NOTHING,
        "Bai et al. 2024, Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client "
        "Resources",
    ),
    "fedex_lora": Explained(
        _LOCAL,
        "up: the changes of both factors; down: the factors, and all residuals so far: it grows with the rounds",
        "the means of A and of B; what their product misses of the mean of B A goes into the frozen weights: exact",
        "all: the residuals in the base",
        "Singhal et al. 2025, FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning, Eq. 7 to 9",
    ),
    "het_lora": Explained(
        f"{_LOCAL}, at its own rank: the first rows of A and columns of B",
        "up: the changes of both factors at the client's rank; down: the factors",
        "the mean of zero-padded factors, weighed by the norm of what each learnt",
        _NOTHING,
        "Cho et al. 2024, Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
    ),
    "fedmezo": Explained(
        "steps along random directions: two forward passes each and no gradient, at the memory of inference",
        _CHANGE,
        "as fedavg",
        _NOTHING,
        "Ling et al. 2024, On the Convergence of Zeroth-Order Federated Tuning for Large Language Models, Algorithm 1",
    ),
    "fedkseed": Explained(
        "all weights move along directions that shared seeds stand for: two forward passes a step, no gradient",
        "up: a number for each seed that it drew; down: a number for each seed, of which anyone makes the weights",
        "the mean of the numbers",
        "the numbers at the server; the weights are made of them anew",
        "Qin et al. 2024, Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost "
        "under 18 Kilobytes, Algorithm 1",
    ),
    "fedkseed_pro": Explained(
        "as fedkseed, with seeds drawn more often along which the loss has been steep",
        "as fedkseed, and for each seed how steep and how often",
        "the mean of the numbers, and the sums of the others",
        "the numbers at the server, with how steep each direction was",
        "Qin et al. 2024, the same paper, Algorithm 2",
    ),
}

_MEAN = "whatever the method does with its numbers"

ADAPTERS_EXPLAINED: Mapping[str, Explained] = {
    "lora": Explained(
        "y = W x + alpha / r B A x on linear layers; trains A and B",
        "A [r, d] and B [o, r] of each layer",
        "all methods; those named after LoRA treat A and B each in its way",
        "exports a PEFT folder of type LORA",
        "Hu et al. 2022, LoRA: Low-Rank Adaptation of Large Language Models",
    ),
    "dora": Explained(
        "as lora, with each row of W + alpha / r B A divided by its norm and multiplied by a magnitude; trains A, B "
        "and the magnitudes",
        "A, B and the magnitudes [o] of each layer",
        _MEAN,
        "exports a PEFT folder of type LORA with use_dora",
        "Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation, Eq. 5",
    ),
    "ia3": Explained(
        "keys, values and the inside of the feed-forward are multiplied by vectors; trains these",
        "one vector of each layer",
        _MEAN,
        "exports a PEFT folder of type IA3",
        "Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
    ),
    "prompt_tuning": Explained(
        "virtual tokens before every text; trains their embeddings",
        "the embeddings [tokens, hidden size]",
        _MEAN,
        "exports a PEFT folder of type PROMPT_TUNING",
        "Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning",
    ),
    "p_tuning": Explained(
        "virtual tokens before every text, made by a small encoder; trains the encoder",
        "the encoder's weights",
        _MEAN,
        "exports a PEFT folder of type P_TUNING with the embeddings that come out",
        "Liu et al. 2021, GPT Understands, Too",
    ),
    "prefix_tuning": Explained(
        "keys and values before those of the text, in every layer; trains these",
        "keys and values [layers, 2, tokens, size]",
        _MEAN,
        "exports a PEFT folder of type PREFIX_TUNING",
        "Li and Liang 2021, Prefix-Tuning: Optimizing Continuous Prompts for Generation",
    ),
    "full": Explained(
        "no adapter: trains every weight of the model",
        "the whole model, in float32",
        _MEAN,
        "exports a model folder",
        "McMahan et al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data",
    ),
    "last_layers": Explained(
        "trains the weights of the last layers; the rest stays as it is",
        "those layers' weights",
        _MEAN,
        "exports a model folder",
        "common practice; compared with PEFT kinds in many of their papers",
    ),
    "bottleneck": Explained(
        "a small network down to a few numbers and up again after sublayers, added to what they give; trains these",
        "both matrices of each small network",
        _MEAN,
        "exports its tensors with a configuration; PEFT has no such kind",
        "Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP",
    ),
    "seed_space": Explained(
        "all weights as functions of one number for each of some seeds; only fedkseed and fedkseed_pro train it",
        "the numbers",
        "the mean of the numbers",
        "exports a model folder",
        "Qin et al. 2024, Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost "
        "under 18 Kilobytes, Eq. 6",
    ),
}

_AS_IT_IS = "decodes each message, then goes on as without it"

COMPRESS_EXPLAINED: Mapping[str, Explained] = {
    "top_k": Explained(
        "keeps the largest numbers of each tensor, a share of them",
        "the numbers and their places",
        _AS_IT_IS,
        "with error feedback, a client: what it left out so far",
        "Aji and Heafield 2017, Sparse Communication for Distributed Gradient Descent",
    ),
    "random_k": Explained(
        "keeps random numbers of each tensor, a share of them",
        "the numbers; their places come from the seed, which both sides have",
        _AS_IT_IS,
        "nothing; with error feedback, a client: what it left out so far",
        "Konecny et al. 2016, Federated Learning: Strategies for Improving Communication Efficiency",
    ),
    "low_rank": Explained(
        "one power iteration makes two thin matrices of each matrix",
        "the thin matrices; what is no matrix travels whole",
        _AS_IT_IS,
        "with error feedback, a client: what it left out so far",
        "Vogels et al. 2019, PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization, "
        "Algorithm 1",
    ),
    "nonzero": Explained(
        "leaves out the zeros",
        "the other numbers and their places: lossless",
        _AS_IT_IS,
        "nothing",
        "for methods whose clients change few of the numbers (fedkseed)",
    ),
    "float16": Explained(
        "16 bits of each number: 11 of precision, up to 65,504",
        "half of the bytes",
        _AS_IT_IS,
        "nothing; with error feedback, a client: what rounding took",
        "IEEE 754",
    ),
    "bfloat16": Explained(
        "16 bits of each number: 8 of precision, the range of float32",
        "half of the bytes",
        _AS_IT_IS,
        "nothing; with error feedback, a client: what rounding took",
        "the upper half of a float32",
    ),
    "quantize": Explained(
        "8 or 4 bits of each number, rounded at random so that the mean is right, and a scale per tensor or block",
        "a quarter or an eighth of the bytes, and the scales",
        _AS_IT_IS,
        "nothing; with error feedback, a client: what rounding took",
        "Alistarh et al. 2017, QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding",
    ),
    "zstd": Explained(
        "packs the bytes of each tensor: lossless",
        "as many bytes as its numbers need; it comes last",
        _AS_IT_IS,
        "nothing",
        "RFC 8878, Zstandard Compression",
    ),
}
