"""Networks that read memory they wrote under another name have no sound graph, so nothing is proved about them."""

import pytest
import torch
from torch import nn

from robustboard.attacks.aliasing import require_no_stale_reads
from robustboard.attacks.bounds import certify
from robustboard.attacks.threat import ThreatModel
from robustboard.errors import BoundsError


class Network(nn.Module):
    """Two linear layers, and `between` on what lies between them."""

    def __init__(self, between):
        super().__init__()
        self.first, self.last, self.between = nn.Linear(4, 4), nn.Linear(4, 3), between

    def forward(self, images):
        return self.last(self.between(self.first(images.flatten(1))))


def through_a_view(hidden):
    flat = hidden.view(-1)
    flat += 1
    return hidden


def through_data(hidden):
    hidden.data.add_(1)
    return hidden


def through_an_index(hidden):
    hidden[:, 0] = 0
    return hidden


def as_output(hidden):
    flat = hidden.view(-1)
    torch.add(flat, 1, out=flat)
    return hidden


def old_name_after_two_writes(hidden):
    hidden += 1
    flat = hidden.view(-1)
    flat.relu_()
    return hidden


def through_a_view_then_by_its_name(hidden):
    flat = hidden.view(-1, 4)
    flat.relu_()
    return flat


def twice_in_place(hidden):
    hidden += 1
    return hidden.relu_()


def another_tensor(hidden):
    before = hidden
    after = torch.relu(hidden)
    after += before
    return after


STALE = (through_a_view, through_data, through_an_index, as_output, old_name_after_two_writes)
PLAIN = (through_a_view_then_by_its_name, twice_in_place, another_tensor)


@pytest.mark.parametrize("between", STALE)
def test_a_stale_read_is_refused(between):
    with pytest.raises(BoundsError, match="reads a tensor again"):
        require_no_stale_reads(Network(between).eval(), torch.rand(2, 1, 2, 2))


@pytest.mark.parametrize("between", PLAIN)
def test_writing_in_place_alone_is_no_reason(between):
    require_no_stale_reads(Network(between).eval(), torch.rand(2, 1, 2, 2))


@pytest.mark.parametrize("method", ["ibp", "crown"])
def test_no_bound_is_given_for_what_the_graph_does_not_show(method):
    torch.manual_seed(0)
    images = torch.rand(5, 1, 2, 2)
    model = Network(through_a_view).eval()
    labels = model(images).argmax(dim=1)
    bounds = certify(model, images, labels, threat=ThreatModel.parse("linf", "1/1000"), method=method, classes=3)
    assert "reads a tensor again" in (bounds.reason or "")
    assert not bounds.certified.any()
