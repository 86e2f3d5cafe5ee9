"""The claims, one row each; the functions that measure them are imported when a row is run."""

from __future__ import annotations

from benchmarks.rows.row import Row

_SKIPPED = "of the pairs skipped"

ALL = (
    Row(
        name="prefill-512",
        claim="Prefill of 512 tokens, SmolLM2-135M, int8; peers vLLM W8A8 and OpenVINO GenAI int8",
        place="prefill:prefill_512",
        min_ratio=1.15,
    ),
    Row(
        name="prefill-512-1b",
        claim="Prefill of 512 tokens, 1.1B Llama (random weights), int8; peer vLLM W8A8",
        place="prefill:prefill_512_1b",
        min_ratio=1.0,
        min_limit_share=0.75,
    ),
    Row(
        name="prefill-8192",
        claim="Prefill of 8192 tokens less the answer, SmolLM2-135M, int8, dense attention; peer OpenVINO GenAI int8",
        place="prefill:prefill_8192",
        min_ratio=1.2,
    ),
    Row(
        name="prefill-16k",
        claim="Prefill of 16,384 tokens less the answer, SmolLM2-135M, int8, dynamic attention; peer OpenVINO GenAI "
        "int8, which attends densely",
        place="prefill:prefill_16k",
        min_ratio=3.0,
    ),
    Row(
        name="decode-128-int8",
        claim="Decode after 128 tokens, SmolLM2-135M, int8; peer llama.cpp Q8_0",
        place="decode:decode_128_int8",
        min_ratio=1.8,
    ),
    Row(
        name="decode-128-int4",
        claim="Decode after 128 tokens, SmolLM2-135M, int4; peer llama.cpp Q4_0",
        place="decode:decode_128_int4",
        min_ratio=1.6,
    ),
    Row(
        name="decode-8192",
        claim="Decode up to 8192 tokens of context, SmolLM2-135M, int8; peer OpenVINO GenAI int8",
        place="decode:decode_8192",
        min_ratio=2.5,
    ),
    Row(
        name="decode-16k",
        claim="Decode after 16,384 tokens, SmolLM2-135M, int8, dynamic attention; peer dseek's dense attention",
        place="decode:decode_16k",
        min_ratio=2.0,
        quick=True,
    ),
    Row(
        name="attention-dense-16k",
        claim="Dense causal attention, 16,384 tokens, 8 heads of 64, bf16; peer PyTorch SDPA in its faster dtype",
        place="attention:attention_dense_16k",
        min_ratio=4.0,
        min_limit_share=0.55,
        quick=True,
    ),
    Row(
        name="attention-sparse-16k",
        claim="Dynamic attention, 16,384 tokens, 8 heads of 64, bf16, means and selection included; peer PyTorch SDPA "
        "in its faster dtype",
        place="attention:attention_sparse_16k",
        min_ratio=15.0,
        quick=True,
    ),
    Row(
        name="growth-64k",
        claim="Growth of dynamic attention's time from 16,384 to 65,536 tokens, against n log n and 15 %",
        place="attention:growth_64k",
        min_ratio=1.0,
        quick=True,
    ),
    Row(
        name="train-attention",
        claim="Training of dynamic attention, 16,384 tokens, 8 heads of 64, bf16; peer PyTorch SDPA in its faster "
        "dtype; bars 2.5x forward and 1.7x backward, the ratio is the smaller share of its bar",
        place="training:train_attention",
        min_ratio=1.0,
        quick=True,
    ),
    Row(
        name="shards-100k",
        claim="Throughput a worker: dynamic attention of 100,000 tokens as 8 subtasks, 9 heads of 64 in 3 groups, "
        "bf16; peer dseek's dense attention as one task",
        place="shards:shards_100k",
        min_ratio=3.2,
        quick=True,
    ),
    Row(
        name="decode-bandwidth",
        claim="Decode as a share of measured read bandwidth, 1.1B Llama (random weights), int8; bar 75 %",
        place="decode:decode_bandwidth",
        min_limit_share=0.75,
        quick=True,
    ),
    Row(
        name="load",
        claim="Start of the process to first token, SmolLM2-135M, Q4_1 file; peer llama.cpp (llama-cpp-python); limit: "
        "weights and cache of peak memory",
        place="load:load",
        min_limit_share=1 / 1.2,
    ),
    Row(
        name="quality-int8",
        claim="Change of perplexity against fp32, int8, 30,000 tokens of Python source; bar 0.5 %",
        place="quality:quality_int8",
        quick=True,
    ),
    Row(
        name="quality-int4",
        claim="Change of perplexity against the file's dequantised fp32, int4; bar 0.5 %",
        place="quality:quality_int4",
        quick=True,
    ),
    Row(
        name="quality-w8a8",
        claim="Largest rise of perplexity over fp32 on held-out Python source and on the user's prose, int8 weights by "
        "channel and int8 activations by token, rotated as dseek loads any model; bar 0.5 %",
        place="quantised:quality_w8a8",
    ),
    Row(
        name="quality-w8a8-file",
        claim="The same without rotation: a compressed-tensors folder that others run, written by dseek quantize; "
        "bar 0.5 %",
        place="quantised:quality_w8a8_file",
    ),
    Row(
        name="quality-int4-peers",
        claim="Rise of perplexity over fp32 on the same texts, int4 in groups of 32 written by dseek quantize, weights "
        "off their file's 4-bit grid; peer the best of torchao int4, llama.cpp Q4_K_M and OpenVINO int4",
        place="quantised:quality_int4_peers",
    ),
    Row(
        name="gate-8k",
        claim="Next-token top-1 that dynamic attention keeps of dense, SmolLM2-135M, bf16, held-out Python source in "
        "8192 tokens",
        place="attention_quality:gate_8k",
        min_ratio=0.992,
        min_limit_share=0.78,
        share_of=_SKIPPED,
    ),
    Row(
        name="gate-16k",
        claim="The same in 16,384 tokens, positions extended by YaRN",
        place="attention_quality:gate_16k",
        min_ratio=0.992,
        min_limit_share=0.85,
        share_of=_SKIPPED,
    ),
    Row(
        name="needle",
        claim="Sentences that dynamic attention retrieves of those that dense does, SmolLM2-135M, bf16, 4096 to 8192 "
        "tokens, all depths",
        place="needle:needle",
        min_ratio=0.98,
        share_of=_SKIPPED,
    ),
    Row(
        name="prose-perplexity",
        claim="Perplexity of dense over dynamic attention, SmolLM2-135M, bf16, prose of the user's in 8192 tokens; bar "
        "0.6 %",
        place="attention_quality:prose_perplexity",
        min_ratio=1 / 1.006,
        min_limit_share=0.8,
        share_of=_SKIPPED,
    ),
    Row(
        name="plan-error",
        claim="Median error of the plan's predictions over precisions, contexts and batches; bar 15 %",
        place="plan_error:plan_error",
        quick=True,
    ),
    Row(
        name="finetune-memory",
        claim="Peak memory of fine-tuning all weights, SmolLM2-135M, fp32, one row of 4,096 tokens, as a share of the "
        "peer's, transformers Trainer without recomputation; bars: 1.8 times lower, and with ZeRO 3 on four processes "
        "at most 0.35 of weights, gradients and state on each; the ratio is the smaller share of the two bars",
        place="finetune:finetune_memory",
        quick=True,
    ),
    Row(
        name="finetune-speed",
        claim="A step of fine-tuning all weights, SmolLM2-135M, fp32, 4 rows of 512 tokens; peer transformers Trainer "
        "with the same settings",
        place="finetune:finetune_speed",
        min_ratio=1.3,
        quick=True,
    ),
    Row(
        name="plan-train-memory",
        claim="Largest error of the predicted peak memory of a training, full and LoRA, with blocks computed twice, "
        "moments in 8 bits and on disk, one or four batches a step; bar 10 %",
        place="finetune:plan_train_memory",
        quick=True,
    ),
    Row(
        name="profiler-overhead",
        claim="Time that profiling adds, the largest of native prefill and decode (SmolLM2-135M, int8, 512 and 128 "
        "tokens) and a pass of the PyTorch module; bar 5 %",
        place="profiler:profiler_overhead",
        quick=True,
    ),
    Row(
        name="plan-what-if",
        claim="Largest error of parameters and operations counted from configurations (Llama 2 and 3, Qwen3, "
        "DeepSeek-V3, GPT-3) against published figures, bar 2 %; fronts of 1.1B here in 2 s and 671B on 8 A100 in 10 s",
        place="planning:plan_what_if",
        quick=True,
    ),
    Row(
        name="plan-time",
        claim="Median error of predicted prefill and decode, four models (two of odd shape), five precisions, prompts "
        "of 128 to 8192, batches of 1 to 32; bars 10 %, and 25 % for the 90th percentile",
        place="planning:plan_time",
    ),
    Row(
        name="plan-memory",
        claim="Median error of predicted peak memory over the loads of plan-time; bars 5 %, and never 10 % too small",
        place="planning:plan_memory",
    ),
    Row(
        name="plan-pick",
        claim="Points of plan-time at which the precision of least predicted time is within 5 % of the fastest "
        "measured; bar 11 of 12",
        place="planning:plan_pick",
    ),
    Row(
        name="mixed-plan-loss",
        claim="Worst factor between the loss that plans from a calibration foresee and the one they have, SmolLM2-135M "
        "off its 4-bit grid, budgets 1 to 10 %, held-out Python source; bar 1.5",
        place="calibrated:mixed_plan_loss",
    ),
    Row(
        name="auto-mode",
        claim="Auto mode with a quality budget of 1 % beside the best single dtype that keeps it, 12 cases of prefill "
        "and decode; bars: slower in none beyond 5 %, faster in half",
        place="calibrated:auto_mode",
    ),
    Row(
        name="pyramid-f1",
        claim="F1 in 4,096 words that small readers gain by the pyramid over its window alone; bar 2.3 points",
        place="pyramid_f1:pyramid_f1",
    ),
    Row(
        name="bleu-int8",
        claim="BLEU that a Transformer trained on Multi30k en-de loses by int8 after QAT (mean of the seeds, 1 % is a "
        "point), and its greedy decoding; peer PyTorch fp32 eager; bars: 0.7 points, less than PTQ loses, 4.2x at "
        "batch 1 and 32; the ratio is the least share of a bar",
        place="translation:bleu_int8",
    ),
    Row(
        name="exact-under-load",
        claim="Answers of 48 streams at once over HTTP, greedy and seeded, that equal the same requests alone, "
        "SmolLM2-135M, fp32",
        place="serving:exact_under_load",
        quick=True,
    ),
    Row(
        name="gap-long-prompt",
        claim="Longest gap of four streams while a prompt of 8192 tokens is computed beside them, SmolLM2-135M, int8, "
        "over HTTP; bar 4 usual gaps",
        place="serving:gap_long_prompt",
        quick=True,
    ),
    Row(
        name="prefix-reuse",
        claim="Time to first token over HTTP of a prompt of 1984 tokens of which 1920 were computed before, "
        "SmolLM2-135M, int8; peer dseek computing it anew",
        place="serving:prefix_reuse",
        min_ratio=5.0,
        quick=True,
    ),
    Row(
        name="streams",
        claim="32 prompts of 128 tokens answered at once with 128 tokens, SmolLM2-135M, int8; peers OpenVINO GenAI "
        "int8 with continuous batching, llama.cpp Q8_0, vLLM W8A8",
        place="streams:streams",
        min_ratio=1.4,
    ),
    Row(
        name="ttft-azure",
        claim="Time to first token, p95, of 300 requests of the Azure conversation trace at a fifth of its rate, "
        "SmolLM2-135M, int8, over HTTP; bar 2 s",
        place="serving:ttft_azure",
    ),
    Row(
        name="soak",
        claim="Growth of the server's memory in half an hour under load with clients that leave, SmolLM2-135M, int8; "
        "bar 2 %",
        place="serving:soak",
    ),
    Row(
        name="hostile",
        claim="Of 10,000 hostile requests, those that are answered with an error of the usual form, while plain ones "
        "are answered as before",
        place="serving:hostile",
        quick=True,
    ),
    Row(
        name="load-generator",
        claim="Requests of the public load generator GuideLLM, as its users install it, that are answered with as many "
        "tokens as it asks for, SmolLM2-135M, int8, chats over HTTP, eight streams",
        place="load_generator:load_generator",
        min_ratio=1.0,
    ),
    Row(
        name="replica-kill",
        claim="`kill -9` of one of two Ray replicas under load, SmolLM2-135M, fp32: none fails that had not begun "
        "to stream, answers equal those generated alone, and the replica is replaced; bar 15 s",
        place="replica_kill:replica_kill",
    ),
    Row(
        name="sync",
        claim="All-reduce of float32 between processes of one host, 64 MiB and 1 MiB, 2 and 4 processes; peer gloo; "
        "the ratio is the smallest of the four",
        place="transport:sync",
        min_ratio=3.2,
        quick=True,
    ),
    Row(
        name="handover",
        claim="Handing 256 MiB to another process of the host where they lie, in memory that both have mapped; peers "
        "gloo's broadcast and Ray's object store; bars: 10 times gloo, and Ray; the ratio is the smaller share",
        place="transport:handover",
        quick=True,
    ),
    Row(
        name="snapshot",
        claim="Stall of a training that saves 256 MiB; peer torch.distributed.checkpoint.async_save",
        place="checkpoints:snapshot",
        quick=True,
    ),
    Row(
        name="recovery",
        claim="From the kill of one of two ranks of `dseek train` to its next step, the longest of 20 kills of either "
        "rank after steps that are drawn, bit-equal afterwards; bar 15 s",
        place="checkpoints:recovery",
        quick=True,
    ),
    Row(
        name="fault-soak",
        claim="Of trainings of two processes that 200 random faults happen to, those that end with other bits than "
        "without faults, or lose a state that was saved; bar 0",
        place="faults:fault_soak",
        quick=True,
    ),
    Row(
        name="availability",
        claim="Share of the time in which a training of two nodes makes lasting steps, simulated with one failure "
        "of a node a day and the recoveries that `recovery` measured; bar 99.97 %",
        place="availability:availability",
        quick=True,
    ),
)
"""In the order in which they are shown."""
