"""From noise to images: noise levels, correction by the critic, the pipeline and its shards."""
