# shellcheck shell=bash disable=SC2034  # sourced by a launch script, which expands the array
MODEL_ARGS=(
   --num-layers 64
   --hidden-size 5120
   --ffn-hidden-size 27648
   --swiglu
   --vocab-size 152064
   --untie-embeddings-and-output-weights

   --group-query-attention
   --num-attention-heads 40
   --num-query-groups 8
   --add-qkv-bias
   --disable-bias-linear

   --normalization RMSNorm
   --norm-epsilon 1e-5
   --use-rotary-position-embeddings
   --rotary-base 1000000
)
