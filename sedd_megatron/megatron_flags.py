"""Megatron-LM's flags that a run has none of: what to do instead, or why they mean nothing here.

Those of megatron/training/arguments.py and of the configurations that it reads in core_v0.16, and what older and newer
versions have besides.
"""

# Flags with one answer stand together; a name that ends in * is how all of a family begin.
ANSWERS = {
    # The model
    (
        "position-embedding-type use-rotary-position-embeddings rotary-* rope-* use-rope-scaling "
        "no-position-embedding mrope-section no-rope-freq mscale mscale-all-dim beta-fast beta-slow yarn-* no-yarn-* "
        "relative-attention-* original-max-position-embeddings apply-rope-fusion no-rope-fusion fused-single-qkv-rope"
    ): "positions are rotary embeddings of the whole head, base 10000; leave it out",
    "max-position-embeddings": "rotary embeddings need none: --seq-length is the length; leave it out",
    "num-query-groups group-query-attention": "every head has its own keys and values; leave it out",
    "kv-channels": "is --hidden-size over --num-attention-heads; change one of those",
    (
        "swiglu squared-relu quick-geglu openai-gelu gated-linear-unit activation-func activation-func-* glu-* "
        "use-te-activation-func use-fused-weighted-squared-relu bias-activation-fusion"
    ): "the MLP is the published one, with a tanh-GELU; leave it out",
    "untie-embeddings-and-output-weights": "always so: embedding and head are two matrices; leave it out",
    (
        "normalization apply-layernorm-1p layernorm-epsilon norm-epsilon memory-efficient-layer-norm "
        "persist-layer-norm no-persist-layer-norm fused-residual-rmsnorm apply-residual-connection-post-layernorm"
    ): (
        "layers begin with the published LayerNorm, epsilon 1e-5, scale without a bias, modulated by the noise; leave "
        "it out"
    ),
    "disable-bias-linear add-bias-linear add-qkv-bias": (
        "the published model has biases in its MLP and none in its attention; leave it out"
    ),
    "attention-dropout": (
        "the published model has dropout behind attention and MLP, --hidden-dropout, and none inside attention; leave "
        "it out"
    ),
    (
        "qk-layernorm qk-l2-norm qk-clip qk-clip-* softmax-scale softmax-type attention-output-gate "
        "log-max-attention-logit window-size window-attn-skip-freq apply-query-key-layer-scaling "
        "no-weight-decay-cond-type apply-wd-to-*"
    ): "the published model has none, and its checkpoints no place for one; leave it out",
    "vocab-extra-ids padded-vocab-size no-pad-vocab-size disable-pad-vocab-size": (
        "the vocabulary is the tokenizer's, padded to a multiple of --make-vocab-size-divisible-by; leave it out"
    ),
    (
        "init-method-std init-method init-method-xavier-uniform output-layer-init-method embedding-init-method "
        "embedding-init-method-std no-initialization use-cpu-initialization init-model-with-meta-device "
        "data-parallel-random-init"
    ): "parameters begin as published, from --seed and their names, alike in every layout; leave it out",
    (
        "num-experts num-moe-experts moe-* expert-* overlap-moe-* ep-overlap-* delay-wgrad-compute overlap-dispatch-* "
        "high-priority-a2a-comm-stream"
    ): "there are no experts in this model; leave it out",
    (
        "multi-latent-attention no-multi-latent-attention disable-multi-latent-attention q-lora-rank kv-lora-rank "
        "qk-head-dim qk-pos-emb-head-dim v-head-dim mla-* cache-mla-latents dsa-* no-dsa-* disable-dsa-* "
        "experimental-attention-variant experimental-attention-variant-*"
    ): "attention is the published one, of whole heads; leave it out",
    (
        "mamba-* disable-mamba-* hybrid-attention-ratio hybrid-mlp-ratio hybrid-override-pattern hybrid-layer-pattern "
        "is-hybrid-model linear-* heterogeneous-* hetereogenous-* gdp-* mhc-* enable-mhc-connections"
    ): "all layers are alike, DiT layers with attention; leave it out",
    "mtp-*": "all positions are predicted at once, so that there are no further tokens to predict; leave it out",
    "use-mup mup-*": "there is no mu-parametrization: choose --lr for the width at hand",
    "spec": "the layers are chosen by --transformer-impl",
    "calculate-per-token-loss": "every sequence has the same number of tokens; leave it out",
    "eod-mask-loss": "the end of a document is a token like any other, which the model has to make; leave it out",
    "no-create-attention-mask-in-dataloader": "attention sees the whole window, and needs no mask; leave it out",
    "fp32-residual-connection": "the residual stream has the weights' precision; train without --bf16 for float32",
    "encoder-* decoder-* model-parallel-size pipeline-model-parallel-split-rank standalone-embedding-stage": (
        "there is one stack of layers: --num-layers, --seq-length, --tensor-model-parallel-size, "
        "--pipeline-model-parallel-size"
    ),
    # The layout
    "use-mcore-models": "always so: leave it out",
    "use-legacy-models": "Megatron-Core's modules are the only ones; leave it out",
    "transformer-pipeline-model-parallel-size": "give --pipeline-model-parallel-size",
    "virtual-pipeline-model-parallel-size num-virtual-stages-per-pipeline-rank": (
        "give the layers of such a stage: --num-layers-per-virtual-pipeline-stage"
    ),
    (
        "num-layers-in-first-pipeline-stage num-layers-in-last-pipeline-stage pipeline-model-parallel-layout "
        "account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split"
    ): "stages have equally many layers; make --num-layers a multiple of --pipeline-model-parallel-size",
    (
        "microbatch-group-size-per-virtual-pipeline-stage no-overlap-p2p-communication overlap-p2p-* no-batch-p2p-* "
        "disable-batch-p2p-* use-ring-exchange-p2p pipeline-model-parallel-comm-backend variable-seq-lengths "
        "no-scatter-gather-tensors-in-pipeline deallocate-pipeline-outputs defer-embedding-wgrad-compute "
        "wgrad-deferral-limit pipeline-dtype"
    ): "how stages talk follows from the layout; leave it out",
    "hierarchical-context-parallel-sizes hybrid-context-parallel max-seqlen-per-dp-cp-rank": (
        "--context-parallel-size alone shares the sequences"
    ),
    "distributed-backend": "NCCL on GPUs and gloo on CPUs (--device); leave it out",
    "distributed-timeout-seconds-after-init": "--distributed-timeout-minutes counts for the whole run",
    "local-rank lazy-mpu-init fake-process-group": "ranks come from torchrun, srun or mpirun; leave it out",
    (
        "use-tp-pp-dp-mapping high-priority-stream-groups nccl-communicator-config-path create-all-gather-group "
        "use-sharp sharp-enabled-group disable-gloo-process-groups use-nccl-ub disable-symmetric-registration "
        "symmetric-ar-type"
    ): "process groups are Megatron-Core's own, as they come; NCCL_* in the environment tunes them",
    "num-distributed-optimizer-instances": "the replicas share one distributed optimizer; leave it out",
    (
        "use-megatron-fsdp use-torch-fsdp2 use-custom-fsdp torch-fsdp2-* fsdp-* megatron-fsdp-* "
        "data-parallel-sharding-strategy outer-dp-sharding-strategy enable-full-sharding-in-hsdp "
        "suggested-communication-unit-size no-strict-fsdp-* disable-strict-fsdp-* gtp-* expert-gtp-* "
        "tensor-parallel-num-weight-shards"
    ): ("there is no FSDP: --use-distributed-optimizer shares the optimizer, --tensor-model-parallel-size the weights"),
    "ddp-num-buckets": "give the size of a bucket, --ddp-bucket-size",
    (
        "ddp-average-in-collective ddp-pad-buckets-for-high-nccl-busbw ddp-reduce-scatter-with-fp32-accumulation "
        "ddp-param-name-* no-gradient-reduce-div-fusion no-align-grad-reduce no-align-param-gather "
        "disable-align-grad-reduce overlap-param-gather-with-optimizer-step reuse-grad-buf-for-mxfp8-param-ag "
        "no-use-layer-wise-param-layout"
    ): "gradients are reduced as Megatron-Core's defaults have it; leave it out",
    "accumulate-allreduce-grads-in-fp32": "always so, unless --grad-reduce-in-bf16 is given: leave it out",
    (
        "no-async-tensor-model-parallel-allreduce disable-async-tensor-model-parallel-allreduce no-clone-scatter-* "
        "disable-clone-scatter-*"
    ): "is as Megatron-Core's default has it; leave it out",
    "tp-comm-overlap-* tp-comm-bootstrap-backend tp-comm-atomic-* no-tp-comm-* disable-tp-comm-*": (
        "--tp-comm-overlap takes Transformer Engine's own choices; leave it out"
    ),
    # Precision, kernels, memory
    "fp16 fp16-lm-cross-entropy": (
        "there is no fp16, whose loss scaling skips steps; every GPU that trains these models has --bf16"
    ),
    "loss-scale initial-loss-scale min-loss-scale loss-scale-window hysteresis": (
        "bf16 needs no loss scaling; leave it out"
    ),
    "params-dtype": "float32, or bfloat16 with --bf16",
    "main-params-dtype main-grads-dtype exp-avg-dtype exp-avg-sq-dtype use-precision-aware-optimizer": (
        "master weights and Adam's moments are float32; of the gradients --grad-reduce-in-bf16 saves memory"
    ),
    "attention-softmax-in-fp32 no-attention-softmax-in-fp32 disable-attention-softmax-in-fp32": (
        "the softmax is float32 in plain torch's layers, and Transformer Engine's affair in its own; leave it out"
    ),
    (
        "fp8-margin fp8-interval no-fp8-wgrad disable-fp8-wgrad fp8-dot-product-attention fp8-multi-head-attention "
        "fp8-output-proj fp8-quantizer-factory tp-only-amax-red first-last-layers-bf16 num-layers-at-start-in-bf16 "
        "num-layers-at-end-in-bf16 keep-fp8-transpose-cache keep-fp8-transpose-cache-* te-precision-config-file"
    ): "FP8 is in the four products of every layer, by --fp8-format and --fp8-recipe",
    "fp8-param": "give --fp8-param-gather",
    "fp8": "give --fp8-format e4m3 or hybrid",
    "fp4 fp4-*": "there is no FP4: --fp8-format is the lowest precision",
    "use-kitchen use-kitchen-* kitchen-* quant-recipe": (
        "belongs to a program beside Megatron-LM that is not used here; leave it out"
    ),
    "disable-bf16-reduced-precision-matmul autocast-dtype enable-autocast": (
        "nothing is cast but by --bf16; leave it out"
    ),
    "attention-backend use-flash-attn flash-attention-version flash-decode": (
        "attention is torch's fused one, or Transformer Engine's with --transformer-impl transformer_engine, which "
        "chooses by NVTE_FLASH_ATTN and NVTE_FUSED_ATTN"
    ),
    "masked-softmax-fusion no-masked-softmax-fusion": "attention is fused whole, without a mask; leave it out",
    "bias-dropout-fusion no-bias-gelu-fusion no-bias-swiglu-fusion no-bias-dropout-fusion disable-jit-fuser": (
        "what stands between matrix products is always fused: by torch.compile on a GPU, by hand on a CPU; leave it out"
    ),
    "gradient-accumulation-fusion no-gradient-accumulation-fusion": "always on, with or without Apex: leave it out",
    "cross-entropy-loss-fusion cross-entropy-fusion-impl output-logit-dtype": (
        "the loss is score entropy, in one pass with the head: --loss-chunk-rows"
    ),
    "cuda-graph-* enable-cuda-graph external-cuda-graph no-cuda-graph-* disable-cuda-graph-* optimizer-cuda-graph": (
        "training has no CUDA graphs; sampling has: generate --cuda-graph"
    ),
    "use-transformer-engine-op-fuser use-inference-optimized-layers": "give --transformer-impl, or leave it out",
    "disable-parameter-transpose-cache batch-invariant-* use-grouped-gemm-*": (
        "kernels are Megatron-Core's own choice; leave it out"
    ),
    "deterministic-mode": "with plain torch's layers a run repeats bit for bit: --transformer-impl local",
    "inference-rng-tracker te-rng-tracker use-te-rng-tracker": (
        "every draw has a key in place of a generator; leave it out"
    ),
    "recompute-activations checkpoint-activations": "give --recompute-granularity selective",
    "distribute-saved-activations num-microbatches-with-partial-activation-checkpoints": (
        "--recompute-granularity is all there is to trade for memory; leave it out"
    ),
    (
        "cpu-offloading cpu-offloading-* no-cpu-offloading-* disable-cpu-offloading-* optimizer-cpu-offload "
        "optimizer-offload-fraction use-torch-optimizer-for-cpu-offload overlap-cpu-optimizer-d2h-h2d "
        "no-pin-cpu-grads no-pin-cpu-params fine-grained-* offload-modules min-offloaded-tensor-size "
        "activation-offload-fraction delay-offload-* delta-offload-* empty-unused-memory-level"
    ): (
        "nothing is moved to the host: share it with --use-distributed-optimizer, or save it with "
        "--recompute-granularity"
    ),
    # Training
    "optimizer": "AdamW is the only one: --adam-beta1, --adam-beta2, --adam-eps, --weight-decay",
    "sgd-momentum muon-* lion-*": "AdamW is the only optimizer; leave it out",
    "start-weight-decay end-weight-decay weight-decay-incr-style wd-incr-steps": (
        "--weight-decay holds for the whole run"
    ),
    "decoupled-lr decoupled-min-lr head-lr-mult": "all parameters have one --lr; leave it out",
    "batch-size": "give --micro-batch-size and --global-batch-size",
    "warmup": "give --lr-warmup-iters",
    "lr-warmup-steps lr-decay-steps wsd-decay-steps": (
        "give --lr-warmup-iters, --lr-decay-iters and --lr-wsd-decay-iters, or the same in samples"
    ),
    (
        "override-opt_param-scheduler override-opt-param-scheduler use-checkpoint-opt_param-scheduler "
        "use-checkpoint-opt-param-scheduler"
    ): "the schedule is the command's, and a line tells what has changed since the checkpoint; leave it out",
    "decrease-batch-size-if-needed": "make --global-batch-size a multiple of --micro-batch-size times the replicas",
    "step-batch-size-schedule phase-transition-iterations": "give --rampup-batch-size",
    "iterations-to-skip": "every sample is trained on once an epoch; leave it out",
    "train-sync-interval": "the host waits for the GPU once a step as it is; leave it out",
    "freeze-all-layers": "what trains no weights is python -m sedd_megatron.evaluate",
    "no-check-for-nan-in-loss disable-check-for-nan-in-loss": (
        "always on: a loss or gradient norm that is not finite is never saved; leave it out"
    ),
    "check-for-large-grads check-for-spiky-loss": "give --spike-factor",
    "rerun-mode error-injection-rate error-injection-type result-rejected-tracker-filename": (
        "give --check-for-nan-in-loss-and-grad, and --spike-factor for spikes: a bad step is replayed"
    ),
    "exit-signal": "SIGTERM, SIGINT, SIGHUP and SIGUSR1 all save and end the run; leave it out",
    "exit-signal-handler-for-training exit-signal-handler-for-dataloader": "always so: leave it out",
    "adlr-autoresume adlr-autoresume-interval": "--save goes on by itself with what it holds; leave it out",
    "inprocess-* enable-ft-package calc-ft-timeouts ft-num-warmup-iters": (
        "torchrun --max-restarts starts the ranks again, and the run goes on; leave it out"
    ),
    # Checkpoints
    "no-save-optim no-save-rng disable-save-optim disable-save-rng": (
        "every checkpoint can be gone on from, and is whole; convert --to-published writes the weights alone"
    ),
    "no-load-rng disable-load-rng": "draws have keys and no state, so that there is none to load; leave it out",
    "use-checkpoint-args use-mp-args-from-checkpoint-args": (
        "give the model's options, best by --config: a difference from the checkpoint is named; the layout is free"
    ),
    "exit-on-missing-checkpoint": "always so: --load of a folder without one ends with a line; leave it out",
    "pretrained-checkpoint": "give --load, which --save goes before once it holds the run",
    "save-retain-interval persistent-save-interval": "give --keep-every, with --keep-last",
    "most-recent-k": "give --keep-last",
    "non-persistent-*": "give --save-interval, and --keep-last to bound what stays",
    (
        "ckpt-format dist-ckpt-* use-dist-ckpt ckpt-* disable-ckpt-* no-ckpt-* auto-detect-ckpt-format replication "
        "replication-* distrib-optim-* use-persistent-ckpt-worker load-main-params-from-ckpt load-model-opt-format "
        "verify-integrity no-stream-ckpt-* disable-stream-ckpt-* override-ckpt-iteration"
    ): "checkpoints are safetensors with digests, written by every rank and read in any layout; leave it out",
    "async-strategy async-ckpt-*": "give --async-save",
    (
        "no-save-tokenizer-assets disable-save-tokenizer-assets no-use-tokenizer-model-from-checkpoint-args "
        "disable-use-tokenizer-model-from-checkpoint-args"
    ): "the tokenizer is in every checkpoint: leave it out",
    "save-config-filepath": "every checkpoint has the options in its manifest.json; leave it out",
    (
        "dump-param-to-param-group-map save-wgrads-interval save-dgrads-interval save-activations-interval "
        "save-params-interval save-tokens-per-expert-interval"
    ): "weights are in checkpoints, and nothing else is written out; leave it out",
    # Data and tokenizers
    "data-args-path per-split-data-args-path per-dataset-sequences-path": (
        "name the corpora in --config: data_path, train_data_path, valid_data_path, test_data_path"
    ),
    "data-cache-path": "there is no index to keep: the order of windows follows from the seed; leave it out",
    "dataloader-type": "always single, with an order that a resumed run goes on with: leave it out",
    (
        "dataloader-fast-cache-load dataloader-defer-npy-index-mmap dataloader-inter-document-masking "
        "num-dataset-builder-threads mid-level-dataset-surplus no-mmap-bin-files no-data-sharding use-one-sent-docs "
        "renormalize-blend-weights short-seq-prob use-same-sampling-seed-*"
    ): "windows are read from the mapped .bin, in an order that (seed, n) decides; leave it out",
    "s3-cache-path": "give --object-storage-cache-path",
    "enable-msc disable-msc": "corpora named msc://... are read so, and no others; leave it out",
    "multiple-validation-sets validation-set-names": (
        "--valid-data-path takes a blend, and one loss is told; evaluate bounds each text by itself"
    ),
    "full-validation": "--eval-iters times --global-batch-size is how many windows are validated on",
    "eval-global-batch-size eval-micro-batch-size start-eval-at-iter": (
        "a validation has the batches of training, every --eval-interval steps"
    ),
    "fim-*": (
        "any positions can be given to a diffusion model (generate --infill) without training for it; leave it out"
    ),
    "sft sft-* chat-template": "train on texts prepared by prepare_data; leave it out",
    (
        "tokenizer-metadata tokenizer-special-tokens tokenizer-hf-* tokenizer-sentencepiece-* tiktoken-* "
        "legacy-tokenizer use-gigatoken null-tokenizer-* trust-remote-code allow-ambiguous-pad-tokens no-tokenizer-* "
        "disable-tokenizer-*"
    ): "the tokenizer is the one that prepare_data was given, which lies beside the data; leave it out",
    # Logging
    "log-params-norm log-num-zeros-in-grad log-l2-norm-grad-to-tensorboard": (
        "grad_norm is in metrics.jsonl; leave it out"
    ),
    (
        "log-timers-to-tensorboard log-memory-to-tensorboard log-world-size-to-tensorboard "
        "log-validation-ppl-to-tensorboard no-log-loss-scale-to-tensorboard disable-log-loss-scale-to-tensorboard "
        "log-throughput-to-tensorboard log-runtime-to-tensorboard memory-keys runtime-time-unit "
        "throughput-window-size"
    ): "what metrics.jsonl gets, TensorBoard gets as well; leave it out",
    "tensorboard-log-interval tensorboard-queue-size": (
        "TensorBoard gets every step, as metrics.jsonl does; leave it out"
    ),
    (
        "log-progress log-energy log-memory-interval log-device-memory-used logging-level modules-to-filter "
        "no-filter-warnings disable-filter-warnings set-level-for-all-loggers config-logger-dir"
    ): "metrics.jsonl and the progress line are the log; leave it out",
    "timing-log-option": "the slowest rank's times are told; leave it out",
    "no-barrier-with-level-1-timing": "--timing-log-level 1 has barriers; leave it out",
    "use-pytorch-profiler": "always so: --profile takes torch's profiler",
    "pytorch-profiler-* record-shapes record-memory-history memory-snapshot-path nvtx-ranges": (
        "--profile writes what the host and the GPU do, and no more; leave it out"
    ),
    "log-straggler straggler-* disable-straggler-on-startup gpu-sniff-test-interval": (
        "--timing-log-level 2 tells forward and backward passes of the slowest rank; leave it out"
    ),
    "flight-recorder-* no-flight-recorder-* disable-flight-recorder-*": (
        "torch's flight recorder heeds TORCH_NCCL_TRACE_BUFFER_SIZE and its like in the environment"
    ),
    "one-logger-* no-one-logger app-tag-* otel-* run-workload-inspector-server": (
        "belongs to a program beside Megatron-LM that is not used here; leave it out"
    ),
    "check-weight-hash-across-dp-replicas-interval": "give --check-replicas-interval",
    # Other programs and tasks
    "yaml-cfg": "give --config, a YAML file whose keys are our flags",
    "enable-experimental test-mode onnx-safe": "there is no such mode; leave it out",
    (
        "inference-* max-tokens-to-oom use-legacy-static-engine nccl-all-reduce-for-prefill mlp-chunks-for-* "
        "num-speculative-tokens decode-only-cuda-graphs enable-chunked-prefill disable-chunked-prefill"
    ): "texts are made by python -m sedd_megatron.generate, which has flags of its own",
    "rl-* grpo-* perform-rl-step langrl-* refit-method": (
        "belongs to another kind of model or task than a diffusion language model; leave it out"
    ),
    "logits-*": "there is no distillation; leave it out",
    (
        "bert-* biencoder-* retriever-* retro-* ict-* dino-* vision-* swin-* img-h img-w num-classes num-channels "
        "patch-dim classes-fraction data-per-class-fraction iter-per-epoch sample-rate mask-type mask-factor "
        "mask-prob block-data-path embedding-path evidence-data-path titles-data-path indexer-* query-in-block-prob "
        "output-bert-embeddings"
    ): "belongs to another kind of model or task than a diffusion language model; leave it out",
    "timers param-sync-func grad-scale-func grad-sync-func no-sync-func finalize-model-grads-func": (
        "is set by training itself; leave it out"
    ),
}

_BY_NAME = {f"--{name}": answer for names, answer in ANSWERS.items() for name in names.split()}
_BY_BEGINNING = {name.removesuffix("*"): answer for name, answer in _BY_NAME.items() if name.endswith("*")}


def answer_of(flag: str) -> str | None:
    """What to do about a flag of Megatron-LM's that we do not have, or its negation; None of any other."""
    negated = flag.replace("--no-", "--", 1) if flag.startswith("--no-") else flag.replace("--", "--no-", 1)
    for name in (flag, negated):
        beginnings = (answer for beginning, answer in _BY_BEGINNING.items() if name.startswith(beginning))
        answer = _BY_NAME.get(name) or next(beginnings, None)
        if answer is not None:
            return answer
    return None
