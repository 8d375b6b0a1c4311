"""Guests that make their own page tables, in both modes of the MMU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.mmu.guest import PagingGuest

NewGuest = Callable[..., PagingGuest]


@pytest.fixture(params=["tdp", "shadow"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def new_guest(mode: str) -> Iterator[NewGuest]:
    guests: list[PagingGuest] = []

    def make(*, width: int = 64, log_dirty: bool = False) -> PagingGuest:
        guests.append(PagingGuest(tdp=mode == "tdp", width=width, log_dirty=log_dirty))
        return guests[-1]

    yield make
    for guest in guests:
        assert guest.vm.mmu.audit() == []
        guest.close()


@pytest.fixture
def guest(new_guest: NewGuest) -> PagingGuest:
    return new_guest()
