# shellcheck shell=bash disable=SC2034  # sourced by a launch script, which expands the array
MODEL_ARGS=(
   # hybrid of gated delta-net and full-attention layers; slime's spec reads the delta-net sizes from --hf-checkpoint
   --spec slime_plugins.models.qwen3_5 get_qwen3_5_spec

   --num-layers 64
   --hidden-size 5120
   --ffn-hidden-size 17408
   --swiglu
   --vocab-size 248320
   --untie-embeddings-and-output-weights

   --group-query-attention
   --num-attention-heads 24
   --num-query-groups 4
   --kv-channels 256
   --qk-layernorm
   --use-gated-attention  # from slime's Megatron patch; unpatched Megatron ignores it and reads the next one
   --attention-output-gate
   --disable-bias-linear

   --normalization RMSNorm
   --norm-epsilon 1e-6
   --apply-layernorm-1p
   --position-embedding-type rope
   --rotary-base 10000000
   --rotary-percent 0.25
)
