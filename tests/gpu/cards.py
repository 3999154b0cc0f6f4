"""Marks of tests by the cards they need."""

import pytest
import torch

needs_two_cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two cards are needed")
