"""Units hold every region once, tasks every unit once, and the split depends on the region only."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from data_prep.plan import Contigs, Options, Unit, _units, split_of, units_of_task


@given(lengths=st.lists(st.integers(0, 50), max_size=12), region=st.integers(1, 20), unit=st.integers(1, 60))
def test_units_hold_every_region_once(lengths: list[int], region: int, unit: int) -> None:
    units = _units(3, lengths, Options(region_bases=region, unit_bases=unit), first_number=7)
    regions = [min(region, length - start) for length in lengths for start in range(0, length, region)]
    position = 0
    for number, each in enumerate(units):
        assert (each.number, each.species, each.first_region) == (7 + number, 3, position)
        position += each.regions
        assert each.bases == sum(regions[each.first_region : position])
        assert each.bases >= unit or each is units[-1]
        assert each.bases - regions[position - 1] < unit  # no region more than needed
    assert position == len(regions)


@given(bases=st.lists(st.integers(1, 1000), min_size=1, max_size=40), num_tasks=st.integers(1, 60))
def test_tasks_hold_every_unit_once_and_in_order(bases: list[int], num_tasks: int) -> None:
    units = [Unit(number, 0, number, 1, size) for number, size in enumerate(bases)]
    tasks = [units_of_task(units, num_tasks, task) for task in range(num_tasks)]
    assert [unit for task in tasks for unit in task] == units
    share = sum(bases) / num_tasks
    assert all(sum(unit.bases for unit in task) <= share + max(bases) for task in tasks)


def test_the_split_is_about_the_fraction_and_stays_what_it_was() -> None:
    parameters = {"seed": 1, "valid_fraction": 0.1}
    splits = [split_of(parameters, "species", "chr1", 0, region) for region in range(5000)]
    assert 400 < splits.count("valid") < 600
    assert {split_of({"seed": 1, "valid_fraction": 0.0}, "s", "c", 0, region) for region in range(99)} == {"train"}
    # Pinned: another hash would silently move regions between the splits of datasets that are made again.
    assert [region for region, split in enumerate(splits) if split == "valid"][:5] == [0, 5, 7, 18, 20]
    assert splits != [split_of(parameters, "species", "chr1", 1, region) for region in range(5000)]
    larger = {"seed": 1, "valid_fraction": 0.2}
    assert all(split_of(larger, "species", "chr1", 0, r) == "valid" for r, s in enumerate(splits) if s == "valid")


def test_records_of_one_name_are_told_apart() -> None:
    contigs = Contigs(10)
    places = [contigs.place(0, "a"), contigs.place(0, "a"), contigs.place(2, "a"), contigs.place(3, "b")]
    assert places == [(10, 0), (10, 0), (12, 1), (13, 0)]
