# shellcheck shell=bash disable=SC2034  # sourced by a launch script, which expands the array
MODEL_ARGS=(
   --num-layers 28
   --hidden-size 3584
   --ffn-hidden-size 18944
   --swiglu
   --vocab-size 152064
   --untie-embeddings-and-output-weights

   --group-query-attention
   --num-attention-heads 28
   --num-query-groups 4
   --add-qkv-bias
   --disable-bias-linear

   --normalization RMSNorm
   --norm-epsilon 1e-6
   --use-rotary-position-embeddings
   --rotary-base 1000000
)
