"""The tasks of ``benchmarks/quality.py``, in the order in which they are run. A task is one entry here."""

from __future__ import annotations

from .generation import Responses, Sorting
from .images import Images
from .task import Task
from .text import MINILM, Sentences

ENCODER_RATES = {
    "full": (1e-4, 3e-4, 1e-3),
    "head": (1e-2, 3e-2, 1e-1),
    "adapter": (1e-3, 3e-3, 1e-2),
    "wide": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "prompt": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
}
SMALL_RATES = {
    "full": (1e-3, 3e-3, 1e-2),
    "head": (1e-2, 3e-2, 1e-1),
    "adapter": (3e-3, 1e-2, 3e-2),
    "wide": (1e-3, 3e-3, 1e-2, 3e-2),
}

_ALL: tuple[Task, ...] = (
    Sorting(
        name="sort",
        title="GPT-2 (Conv1D, 86 k) that sorts six letters, taught to sort descending",
        metric="exact match",
        decoder="gpt-nano-sort-gpt2",
        steps=400,
        batch_size=32,
        rank=4,
        alpha=8,
        targets=("c_attn", "c_proj", "c_fc"),
        head=("lm_head",),
        new_head=False,
        task_type="CAUSAL_LM",
        rates=SMALL_RATES | {"adapter": (1e-3, 3e-3, 1e-2)},
        bound=("test", 1.0),
    ),
    Responses(
        name="e2e",
        title="stories260K (Llama, 260 k) on E2E NLG: sentences from facts",
        metric="loss, nats/token",
        lower_is_better=True,
        data="gen/e2e_nlg",
        decoder="stories260K-llama",
        steps=300,
        batch_size=16,
        alpha=32,
        head=("lm_head",),
        new_head=False,
        task_type="CAUSAL_LM",
        # 1.2e-2 is ahead after a third of the steps, by which rates are chosen, and behind after all of them.
        rates=SMALL_RATES | {"adapter": (1.5e-3, 3e-3, 6e-3)},
        bound=("dev", 0.82),
        control=True,
        pool=1,
        most={"train": 4800, "dev": 300, "test": 1000},
    ),
    Sentences(
        name="trec",
        title="MiniLM (BERT, 22.7 M) on TREC: six types of questions",
        metric="accuracy",
        data="en/trec",
        encoder=MINILM,
        labels=6,
        longest=24,
        steps=160,
        batch_size=32,
        task_type="SEQ_CLS",
        rates=ENCODER_RATES,
    ),
    Sentences(
        name="esol",
        title="SMILES ALBERT (twelve passes of one layer, 0.7 M) on ESOL: solubility of molecules",
        metric="R2",
        data="chem/esol",
        encoder="rxnmapper-albert-smiles",
        labels=1,
        longest=128,
        steps=140,
        batch_size=32,
        head=("pooler", "classifier"),
        targets=("query", "key", "value", "dense", "ffn", "ffn_output"),
        task_type="SEQ_CLS",
        rates=ENCODER_RATES,
        bound=("test", 0.883),
    ),
    Images(
        name="cifar",
        title="MobileNetV1 0.25 (convolutions, 0.2 M) on 2,000 CIFAR-10 photographs",
        metric="accuracy",
        data="img/cifar10_subset",
        network="mobilenet-v1-0.25-128-imagenet",
        labels=10,
        pixels=64,
        steps=400,
        batch_size=32,
        # The stem and the 1 x 1 convolutions; a depthwise one has no room for a low-rank update.
        targets=r".*(conv_stem|layer\.\d*[13579])\.convolution",
        rates=SMALL_RATES | {"full": (3e-4, 1e-3, 3e-3), "adapter": (1e-3, 3e-3, 1e-2)},
    ),
    Sentences(
        name="sst2",
        title="MiniLM (BERT, 22.7 M) on SST-2: sentiment of sentences",
        metric="accuracy",
        data="en/sst2",
        encoder=MINILM,
        labels=2,
        longest=48,
        steps=160,
        batch_size=32,
        task_type="SEQ_CLS",
        # With 3e-3 one of three seeds of DoRA learns nothing.
        rates=ENCODER_RATES | {"adapter": (1e-3, 2e-3)},
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
