# shellcheck shell=bash disable=SC2034  # sourced by a launch script, which expands the array
MODEL_ARGS=(
   --num-layers 28
   --hidden-size 1024
   --ffn-hidden-size 3072
   --swiglu
   --vocab-size 151936

   --group-query-attention
   --num-attention-heads 16
   --num-query-groups 8
   --kv-channels 128
   --qk-layernorm
   --disable-bias-linear

   --normalization RMSNorm
   --norm-epsilon 1e-6
   --use-rotary-position-embeddings
   --rotary-base "${MODEL_ARGS_ROTARY_BASE:-1000000}"  # 5000000 for the 2507 releases
)
