"""Guests that make their own page tables, in both modes of the MMU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.mmu.flat import Flat
from tests.mmu.guest import PagingGuest

NewGuest = Callable[..., PagingGuest]
NewFlat = Callable[..., Flat]


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
def new_shadow() -> Iterator[NewGuest]:
    """Guests on shadow paging."""
    guests: list[PagingGuest] = []

    def make(**options: int) -> PagingGuest:
        guests.append(PagingGuest(tdp=False, **options))  # type: ignore[arg-type]
        return guests[-1]

    yield make
    for guest in guests:
        assert guest.vm.mmu.audit() == []
        guest.close()


@pytest.fixture
def guest(new_guest: NewGuest) -> PagingGuest:
    return new_guest()


@pytest.fixture
def new_flat(mode: str) -> Iterator[NewFlat]:
    """Return a function that makes a guest without paging."""
    guests: list[Flat] = []

    def make(vcpus: int = 1, cpu: str | None = None) -> Flat:
        guests.append(Flat(tdp=mode == "tdp", vcpus=vcpus, cpu=cpu))
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()


@pytest.fixture
def flat(new_flat: NewFlat) -> Flat:
    return new_flat()
