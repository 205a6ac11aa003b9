"""What is read off a model's config."""

import pytest

from mpoe_convert.artifact.loading import block_length


@pytest.mark.parametrize(("limit", "length"), [(None, 512), (0, 512), (48, 48), (512, 512), (4096, 512)])
def test_blocks_are_as_long_as_the_model_can_read_up_to_512_tokens(limit, length):
    assert block_length(limit) == length
