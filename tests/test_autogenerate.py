"""`alembic revision --autogenerate` writes safe revisions and refuses other operations."""

import json
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from sqlalchemy import URL, Engine, inspect, text

from tests.migrations import copy_project
from tests.processes import run_python
from tests.schemas import schema_of
from tests.service import BIN, engine, environment
from tests.test_migrations import EVERYWHERE, HEAD, insert, rows, squawk

FIRST, SECOND, THIRD = (f"{int(HEAD) + number:04}" for number in (1, 2, 3))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return copy_project(tmp_path)


def edit(project: Path, *changes: tuple[str, str]) -> None:
    """Replace each first text in the models by the second one."""
    models = project / "app" / "models.py"
    source = models.read_text()
    for old, new in changes:
        assert old in source
        source = source.replace(old, new, 1)
    models.write_text(source)


RUN = """
import json
import sys
from alembic.config import CommandLine
for command in json.loads(sys.argv[1]):
    CommandLine("alembic").main(command)
"""


class Run(NamedTuple):
    returncode: int
    output: str


def alembic(project: Path, url: URL, *commands: list[str]) -> Run:
    """Run several commands of alembic in one process, until one fails."""
    env = environment(url, LOG_FORMAT="console")
    ended = run_python("-c", RUN, json.dumps(commands), env=env, cwd=project)
    return Run(ended.returncode, ended.stdout + ended.stderr)


def generate(message: str) -> list[str]:
    return ["revision", "--autogenerate", "-m", message]


def body(project: Path, number: str, function: str = "upgrade") -> list[str]:
    """Return the statements of a generated revision, each on one line."""
    [revision] = (project / "alembic" / "versions").glob(f"*_{number}_*.py")
    source = revision.read_text().partition(f"def {function}()")[2].partition("\n\n\n")[0]
    lines = source.splitlines()[1:]
    code = "\n".join(line[4:] for line in lines if not line.strip().startswith("#"))
    statements = re.split(r"\n(?=\w)", code.strip())
    joined = (re.sub(r"\s+", " ", each) for each in statements)
    return [re.sub(r",? ([)\]])", r"\1", re.sub(r"([(\[]) ", r"\1", each)) for each in joined]


MEMBERS = """    secret_name: str
    team_id: int | None = Field(default=None, foreign_key="team.id")
    badge: str | None = Field(default=None, unique=True)
    power: str = "none"
    active: bool = True
    level: int = 3
    rival_id: int | None = Field(default=None, foreign_key="hero.id", ondelete="SET NULL")


class Team(Row, table=True):
    name: str = Field(index=True)


class HeroPublic"""
ALL = (
    ("    secret_name: str\n\n\nclass HeroPublic", MEMBERS),
    ("    age: Age | None = None\n", "    age: Age = 0\n"),
    ('CheckConstraint("age >= 0"', 'CheckConstraint("age >= 0 AND age < 1000"'),
    ('Index("ix_hero_age_id", "age", "id"),', 'Index("ix_hero_level", "level"),'),
    (
        '        Index("ix_hero_name_id"',
        '        CheckConstraint("power NOT LIKE \'%:x%\'", name="power"),\n'
        '        Index("ix_hero_name_id"',
    ),
)
ID = 'sa.BigInteger().with_variant(sa.Integer(), "sqlite")'
AUTO = "sqlmodel.sql.sqltypes.AutoString()"


def test_a_generated_change_is_safe_and_the_same_on_both_databases(
    project: Path, database_url: URL, database: Engine
) -> None:
    with database.connect() as connection:
        connection.execute(text("INSERT INTO hero (name, age, secret_name) VALUES ('n', 1, 's')"))
    edit(project, *ALL)
    to_head = ["upgrade", "head"]
    run = alembic(project, database_url, generate("Teams"), to_head, ["check"])
    assert run.returncode == 0, run.output
    after, kept = tables(database_url), rows(database)

    assert body(project, FIRST) == [
        f'op.create_table("team", sa.Column("id", {ID}, nullable=False),'
        ' sa.Column("version", sa.Integer(), server_default="1", nullable=False),'
        f' sa.Column("name", {AUTO}, nullable=False),'
        ' sa.PrimaryKeyConstraint("id", name=op.f("team_pkey")), sqlite_autoincrement=True)',
        'op.create_index(op.f("ix_team_name"), "team", ["name"], unique=False)',
        f'op.add_column("hero", sa.Column("team_id", {ID}, nullable=True))',
        f'op.add_column("hero", sa.Column("badge", {AUTO}, nullable=True))',
        f'op.add_column("hero", sa.Column("power", {AUTO}, server_default="none", nullable=False))',
        'op.add_column("hero", sa.Column("active", sa.Boolean(), server_default="1",'
        " nullable=False))",
        'op.add_column("hero", sa.Column("level", sa.Integer(), server_default="3",'
        " nullable=False))",
        f'op.add_column("hero", sa.Column("rival_id", {ID}, nullable=True))',
        'with op.batch_alter_table("hero", schema=None) as batch_op:'
        ' batch_op.alter_column("age", server_default="0")',
    ]
    assert body(project, FIRST, "downgrade")[1:] == [
        'op.drop_column("hero", "rival_id")',
        'op.drop_column("hero", "level")',
        'op.drop_column("hero", "active")',
        'op.drop_column("hero", "power")',
        'op.drop_column("hero", "badge")',
        'op.drop_column("hero", "team_id")',
        'op.drop_index(op.f("ix_team_name"), table_name="team")',
        'op.drop_table("team")',
    ]
    assert sorted(body(project, SECOND)) == [
        'add_check("hero_age_not_negative_check", "hero", "age >= 0 AND age < 1000")',
        'add_check("hero_power_check", "hero", "power NOT LIKE \'%:x%\'")',
        'add_foreign_key("hero_rival_id_fkey", "hero", ["rival_id"], "hero", ["id"],'
        ' ondelete="SET NULL")',
        'add_foreign_key("hero_team_id_fkey", "hero", ["team_id"], "team", ["id"])',
        'add_unique("hero_badge_key", "hero", ["badge"])',
        'create_index("ix_hero_level", "hero", ["level"])',
        'create_index("ix_hero_rival_id", "hero", ["rival_id"])',
        'create_index("ix_hero_team_id", "hero", ["team_id"])',
        'drop_constraint("hero_age_not_negative_check", "hero", type_="check")',
        'drop_index("ix_hero_age_id", "hero")',
        'set_not_null("hero", "age")',
    ]
    assert sorted(body(project, SECOND, "downgrade")) == [
        'add_check("hero_age_not_negative_check", "hero", "age >= 0")',
        'create_index("ix_hero_age_id", "hero", ["age", "id"])',
        'drop_constraint("hero_age_not_negative_check", "hero", type_="check")',
        'drop_constraint("hero_badge_key", "hero", type_="unique")',
        'drop_constraint("hero_power_check", "hero", type_="check")',
        'drop_constraint("hero_rival_id_fkey", "hero", type_="foreignkey")',
        'drop_constraint("hero_team_id_fkey", "hero", type_="foreignkey")',
        'drop_index("ix_hero_level", "hero")',
        'drop_index("ix_hero_rival_id", "hero")',
        'drop_index("ix_hero_team_id", "hero")',
        'drop_not_null("hero", "age")',
    ]
    linted = subprocess.run(
        [BIN / "ruff", "check", "alembic"], cwd=project, capture_output=True, text=True
    )
    assert linted.returncode == 0, linted.stdout

    offline = environment("postgresql://h/db", LOG_LEVEL="ERROR")
    sql = run_python("-m", "alembic", "upgrade", f"{HEAD}:head", "--sql", env=offline, cwd=project)
    assert sql.returncode == 0, sql.stderr
    (project / "generated.sql").write_text(sql.stdout)
    assert squawk(project / "generated.sql") - EVERYWHERE.keys() == set()

    run = alembic(project, database_url, ["downgrade", HEAD], to_head, ["check"])
    assert run.returncode == 0, run.output
    assert tables(database_url) == after
    assert rows(database) == kept


def tables(url: URL) -> list[str]:
    return [each for each in schema_of(url) if "TABLE" in each]


def test_the_schema_without_the_change_comes_back(
    project: Path, database_url: URL, database: Engine
) -> None:
    insert(database)
    before, kept = tables(database_url), rows(database)
    edit(project, *(change for change in ALL if "Age" not in change[0]))
    run = alembic(
        project, database_url, generate("Teams"), ["upgrade", "head"], ["downgrade", HEAD]
    )
    assert run.returncode == 0, run.output
    assert tables(database_url) == before
    assert rows(database) == kept


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_indexes_with_expressions_and_conditions_are_generated(
    project: Path, database_url: URL
) -> None:
    edit(
        project,
        ("from sqlalchemy import ", "from sqlalchemy import text, "),
        (
            '        Index("ix_hero_name_id"',
            '        Index("ix_lower", text("lower(name)"), unique=True),\n'
            '        Index("ix_old", "age", postgresql_where=text("age > 90")),\n'
            '        Index("ix_hero_name_id"',
        ),
    )
    run = alembic(
        project,
        database_url,
        *(generate("I"), ["upgrade", "head"], ["check"]),
        *(["downgrade", HEAD], ["upgrade", "head"], ["check"]),
    )
    assert run.returncode == 0, run.output
    assert body(project, FIRST) == [
        'create_index("ix_lower", "hero", [sa.text("lower(name)")], unique=True)',
        'create_index("ix_old", "hero", ["age"], postgresql_where=sa.text("age > 90"))',
    ]


REFUSED = (
    (
        "Age =",
        "import datetime\nimport enum\n\nfrom sqlalchemy import func\n\n"
        "class Kind(enum.Enum):\n    A = 1\n\nAge =",
    ),
    (
        "    secret_name: str\n\n\nclass HeroPublic",
        """    secret_name: int
    kind: Kind | None
    born: datetime.date
    draw: float = Field(sa_column_kwargs={"server_default": func.random()})


class Far(Row, table=True):
    __table_args__ = ({"schema": "elsewhere"},)


class HeroPublic""",
    ),
    ("    name: Text = Field(sa_type=String)\n", ""),
    ('        CheckConstraint("length(name) BETWEEN 1 AND 200", name="name_length"),\n', ""),
    ('        Index("ix_hero_name_id", "name", "id"),\n', ""),
)


def test_operations_without_a_safe_form_are_refused_in_one_line(
    project: Path, database_url: URL
) -> None:
    edit(project, *REFUSED)
    before, revisions = schema_of(database_url), len(list((project / "alembic").rglob("*.py")))
    run = alembic(project, database_url, generate("All"))
    assert run.returncode != 0
    assert "Traceback" not in run.output
    [line] = [line for line in run.output.splitlines() if line.startswith("FAILED: ")]
    assert 'hero.kind is a native enum (see "Enum")' in line
    assert "the table elsewhere.far has a schema" in line
    assert 'hero.born is NOT NULL without a server default (see "Add a column")' in line
    assert "hero.draw has the default random(), which may rewrite the table" in line
    assert 'changing the type of hero.secret_name to Integer() (see "Change a type")' in line
    assert 'dropping hero.name (see "Drop a column", or "Rename a column")' in line
    assert "# safe: reason" in line
    assert len(list((project / "alembic").rglob("*.py"))) == revisions
    assert schema_of(database_url) == before


def test_a_drop_is_generated_with_a_reason_and_can_be_downgraded(
    project: Path, database_url: URL, database: Engine
) -> None:
    insert(database)
    edit(
        project,
        ("    age: Age | None = None\n", ""),
        ('        CheckConstraint("age >= 0", name="age_not_negative"),\n', ""),
        ('        Index("ix_hero_age_id", "age", "id"),\n', ""),
        ("    secret_name: str\n\n\nclass", "    secret_name: str\n    power: str = ''\n\n\nclass"),
    )
    message = "Drop age # safe: no release reads it since 0.3"
    to_head = ["upgrade", "head"]
    run = alembic(project, database_url, generate(message), to_head, ["check"])
    assert run.returncode == 0, run.output
    assert [len(body(project, number)) for number in (FIRST, SECOND, THIRD)] == [1, 2, 1]
    assert body(project, THIRD) == ['op.drop_column("hero", "age")']
    [revision] = (project / "alembic" / "versions").glob(f"*_{THIRD}_*.py")
    assert f'"""{message}, 3 of 3' in revision.read_text()
    assert "age" not in {column["name"] for column in inspect(database).get_columns("hero")}
    run = alembic(project, database_url, ["downgrade", HEAD], to_head, ["check"])
    assert run.returncode == 0, run.output


DEFAULTS = (
    ("from sqlalchemy import ", "import datetime\n\nfrom sqlalchemy import JSON, func, "),
    (
        "    secret_name: str\n\n\nclass HeroPublic",
        """    secret_name: str
    quoted: str = "it's 100%"
    lines: str = "a\\nb"
    empty: str = ""
    made: datetime.datetime = Field(sa_column_kwargs={"server_default": func.now()})
    settings: str = Field(sa_type=JSON, sa_column_kwargs={"server_default": '{"a": 1}'})


class HeroPublic""",
    ),
)


def test_a_default_of_any_kind_is_added_to_rows_and_is_no_difference_afterwards(
    project: Path, database_url: URL, database: Engine
) -> None:
    insert(database)
    edit(project, *DEFAULTS)
    to_head = ["upgrade", "head"]
    run = alembic(project, database_url, generate("Defaults"), to_head, ["check"])
    assert run.returncode == 0, run.output
    with database.connect() as connection:
        found = connection.execute(text("SELECT quoted, lines, made IS NULL FROM hero")).all()
    assert {tuple(row) for row in found} == {("it's 100%", "a\nb", False)}
    edit(project, ("it's 100%", "it's 50%"), ('{"a": 1}', '{"a": 2}'))
    run = alembic(project, database_url, generate("Others"), to_head, ["check"])
    assert run.returncode == 0, run.output
    assert len(body(project, SECOND)) == 2, "both changes are seen"
    run = alembic(project, database_url, ["downgrade", HEAD], to_head, ["check"])
    assert run.returncode == 0, run.output


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_a_colon_in_an_expression_stays_a_colon(
    project: Path, database_url: URL, database: Engine
) -> None:
    edit(
        project,
        ("from sqlalchemy import ", "from sqlalchemy import text, "),
        (
            '        Index("ix_hero_name_id"',
            """        CheckConstraint(r"name <> '\\:x'", name="one"),
        CheckConstraint("name <> ':y'", name="two"),
        Index("ix_colon", text(r"(name || '\\:x')"), postgresql_where=text(r"name > '\\:z'")),
        Index("ix_hero_name_id\"""",
        ),
    )
    to_head = ["upgrade", "head"]
    run = alembic(project, database_url, generate("C"), to_head)
    assert run.returncode == 0, run.output
    definitions = (
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname IN"
        " ('hero_one_check', 'hero_two_check')"
        " UNION ALL SELECT pg_get_indexdef('ix_colon'::regclass)"
    )
    with database.connect() as connection:
        found = str(connection.scalars(text(definitions.replace(":", "\\:"))).all())
    assert all(f"'{colon}'" in found for colon in (":x", ":y", ":z")), found
    assert "\\" not in found


def test_longer_text_is_a_change_of_the_catalogue_only(project: Path, database_url: URL) -> None:
    short = "sa_type=String(40)"
    edit(project, ("    secret_name: str\n\n\nclass", "    secret_name: str = _N\n\n\nclass"))
    edit(project, ("Age =", f"from sqlalchemy import CHAR\n\n_N = Field({short})\nAge ="))
    run = alembic(project, database_url, generate("# safe: a test"), ["upgrade", "head"])
    assert run.returncode == 0, run.output
    edit(project, (short, "sa_type=String(50)"))
    run = alembic(project, database_url, generate("Longer"), ["upgrade", "head"], ["check"])
    assert run.returncode == 0, run.output
    assert body(project, SECOND) == [
        'with op.batch_alter_table("hero", schema=None) as batch_op:'
        ' batch_op.alter_column("secret_name", type_=sa.String(length=50))'
    ]
    # PostgreSQL rewrites the table for the one, and builds the indexes again for the other.
    for other in ("CHAR(60)", "String(60, collation='C')"):
        edit(project, ("sa_type=String(50)", f"sa_type={other}"))
        run = alembic(project, database_url, generate("Other"))
        assert "changing the type of hero.secret_name" in run.output
        edit(project, (f"sa_type={other}", "sa_type=String(50)"))


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
def test_check_compares_the_conditions_of_check_constraints(
    project: Path, database_url: URL, database: Engine
) -> None:
    """The condition BETWEEN in the models is no difference, although PostgreSQL rewrites it."""
    assert alembic(project, database_url, ["check"]).returncode == 0
    with database.connect() as connection:
        name = "hero_name_length_check"
        connection.execute(text(f"ALTER TABLE hero DROP CONSTRAINT {name}"))
        run = alembic(project, database_url, ["check"])
        assert (run.returncode, "add_constraint" in run.output) == (255, True), run.output
        add = f"ALTER TABLE hero ADD CONSTRAINT {name} CHECK"
        connection.execute(text(f"{add} (length(name) BETWEEN 1 AND 300)"))
        run = alembic(project, database_url, ["check"])
        assert (run.returncode, "add_constraint" in run.output) == (255, True), run.output
        connection.execute(text(f"ALTER TABLE hero DROP CONSTRAINT {name}"))
        connection.execute(text(f"{add} (length(name) >= 1 AND length(name) <= 200)"))
        assert alembic(project, database_url, ["check"]).returncode == 0
        # A standby has no temporary tables.
        read_only = f"ALTER DATABASE {database_url.database} SET default_transaction_read_only = on"
        connection.execute(text(read_only))
    assert alembic(project, database_url, ["check"]).returncode == 0


def test_an_unknown_revision_is_reported_in_one_line(project: Path, database_url: URL) -> None:
    for command in (["upgrade", "4711"], ["downgrade", "4711"], generate("New")):
        if command[0] == "revision":
            with_unknown = text("UPDATE alembic_version SET version_num = '4711'")
            with engine(database_url).connect() as connection:
                connection.execute(with_unknown)
        run = alembic(project, database_url, command)
        assert run.returncode != 0
        assert "Traceback" not in run.output
        unknown = ("Can't locate revision identified by '4711'", "The database is at 4711, which")
        assert any(f"FAILED: {reason}" in run.output for reason in unknown)
