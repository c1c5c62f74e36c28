"""The op in the trainers and under the calling conventions of other libraries."""
