"""The layouts that the tests run: name -> (number of ranks, flags of examples/pretrain_sedd.py)."""

MODEL = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --cond-dim 16 --seq-length 16 --hidden-dropout 0.1 "
    "--make-vocab-size-divisible-by 8 --global-batch-size 8 --micro-batch-size 2 --lr 1e-3 --lr-warmup-iters 4 "
    # Adam's first updates are signs: without an epsilon above rounding noise, an entry whose gradient is nothing but
    # noise moves by a whole step either way.
    "--adam-eps 1e-4 --ema-decay 0.9 --eval-interval 10 --eval-iters 2 --split 80,20,0 --device cpu"
).split()
STEPS = 20
HALFWAY = 10

GRAPHS = {"absorb": ["--graph", "absorb"], "uniform": ["--graph", "uniform", "--noise", "geometric"]}

TP2 = "--tensor-model-parallel-size 2".split()
PP2 = "--pipeline-model-parallel-size 2".split()
CP2 = "--context-parallel-size 2".split()
SP = ["--sequence-parallel"]
VPP = "--num-layers-per-virtual-pipeline-stage 1".split()
DIST_OPT = ["--use-distributed-optimizer"]
# Buckets below a layer's size, so that there are several to overlap.
OVERLAP_GRAD = "--overlap-grad-reduce --ddp-bucket-size 2000".split()
OVERLAP = [*OVERLAP_GRAD, "--overlap-param-gather"]
FULL_UNIFORM = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2".split()
FULL_BLOCK = "--recompute-granularity full --recompute-method block --recompute-num-layers 1".split()
SELECTIVE = "--recompute-granularity selective --recompute-modules core_attn layernorm mlp".split()

# The loss from all logits at once, and from a few rows at a time; the reference takes all rows in one piece.
DENSE = "--loss-chunk-rows 0".split()
CHUNKS = "--loss-chunk-rows 5".split()

LAYOUTS = {
    "recompute-uniform": (1, FULL_UNIFORM),
    "recompute-block": (1, FULL_BLOCK),
    "recompute-selective": (1, SELECTIVE),
    "accumulate-8": (1, ["--micro-batch-size", "1"]),
    "accumulate-1": (1, ["--micro-batch-size", "8"]),
    "dense-loss": (1, DENSE),
    "chunks": (1, CHUNKS),
    "TP2": (2, TP2),
    "PP2": (2, PP2),
    "VPP2": (2, [*PP2, *VPP]),
    "CP2": (2, CP2),
    "SP2": (2, [*TP2, *SP]),
    "DP2": (2, []),
    "DP2-overlap": (2, OVERLAP_GRAD),
    "DP2-dist-opt": (2, DIST_OPT),
    "DP2-dist-opt-overlap": (2, [*DIST_OPT, *OVERLAP]),
    "TP2-PP2": (4, [*TP2, *PP2]),
    "TP2-DP2": (4, TP2),
    "PP2-DP2": (4, [*PP2, *DENSE]),
    "PP4": (4, ["--pipeline-model-parallel-size", "4"]),
    "CP4": (4, ["--context-parallel-size", "4"]),
    "SP4": (4, ["--tensor-model-parallel-size", "4", *SP]),
    "DP4-dist-opt": (4, DIST_OPT),
    "SP2-VPP2": (4, [*TP2, *SP, *PP2, *VPP]),
    "SP2-CP2": (4, [*TP2, *SP, *CP2, *CHUNKS]),
    "CP2-DP2-dist-opt": (4, [*CP2, *DIST_OPT]),
    "VPP2-DP2-dist-opt-overlap": (4, [*PP2, *VPP, *DIST_OPT, *OVERLAP]),
    "VPP2-CP2-dist-opt": (4, [*PP2, *VPP, *CP2, *DIST_OPT]),
    "PP2-CP2-selective": (4, [*PP2, *CP2, *SELECTIVE]),
    "SP2-DP2-dist-opt-overlap-uniform": (4, [*TP2, *SP, *DIST_OPT, *OVERLAP, *FULL_UNIFORM]),
    "SP2-DP2-dist-opt-accumulate-4": (4, [*TP2, *SP, *DIST_OPT, *OVERLAP_GRAD, "--micro-batch-size", "1"]),
}

# Both graphs where a layout touches what the loss or the data does.
UNIFORM_LAYOUTS = ("dense-loss", "TP2", "CP2", "VPP2", "DP2-dist-opt", "SP2-CP2")

# Saved halfway in the first, continued in the second; every kind of sharding meets every other.
RESHARDED = [
    ("SP2", "one"),
    ("VPP2", "one"),
    ("CP2", "one"),
    ("DP2-dist-opt-overlap", "one"),
    ("VPP2-DP2-dist-opt-overlap", "one"),
    ("SP2-DP2-dist-opt-overlap-uniform", "one"),
    ("one", "SP2"),
    ("one", "DP2-dist-opt"),
    ("DP2-dist-opt", "TP2"),
    ("TP2", "VPP2"),
    ("VPP2", "DP2-dist-opt"),
    ("CP2", "DP2-dist-opt-overlap"),
    ("SP2-DP2-dist-opt-overlap-uniform", "CP2"),
    ("DP2-dist-opt", "DP2"),
    ("DP2", "DP2-dist-opt"),
    ("DP4-dist-opt", "DP2-dist-opt"),
    ("PP4", "PP2"),
    ("one", "VPP2-DP2-dist-opt-overlap"),
    ("DP2-dist-opt", "DP4-dist-opt"),
    ("SP2", "VPP2-CP2-dist-opt"),
    ("DP4-dist-opt", "SP2-DP2-dist-opt-overlap-uniform"),
    ("VPP2-DP2-dist-opt-overlap", "TP2-PP2"),
    ("SP2-VPP2", "DP4-dist-opt"),
    ("CP2-DP2-dist-opt", "PP4"),
    ("PP4", "CP2-DP2-dist-opt"),
    ("SP4", "SP2-VPP2"),
]

# Resumed in their own layout, where every bit must be the same: name -> (number of ranks, flags).
RESUMED = {
    "plain": (1, []),
    "no-dropout": (1, ["--hidden-dropout", "0"]),
    "workers": (1, ["--num-workers", "2"]),
    # Halfway is in the middle of an interval.
    "ema-interval": (1, ["--ema-interval", "4"]),
    "bf16": (1, ["--bf16"]),
    "bf16-DP2-dist-opt": (2, ["--bf16", *DIST_OPT, *OVERLAP]),
    "async": (2, [*TP2, "--async-save"]),
    "SP2": (2, [*TP2, *SP]),
}
