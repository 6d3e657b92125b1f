# shellcheck shell=bash disable=SC2034  # sourced by a launch script, which expands the array
MODEL_ARGS=(
   --num-layers 28
   --hidden-size 1536
   --ffn-hidden-size 8960
   --swiglu
   --vocab-size 151936

   --group-query-attention
   --num-attention-heads 12
   --num-query-groups 2
   --add-qkv-bias
   --disable-bias-linear

   --normalization RMSNorm
   --norm-epsilon 1e-6
   --use-rotary-position-embeddings
   --rotary-base 1000000
)
