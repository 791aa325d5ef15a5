import jinja2
import pytest
from jinja2.sandbox import SecurityError

from martlet.chat import sandbox


def run(source, **variables):
    return sandbox.render(sandbox.compile_template(source), variables)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "{% for m in ms %}{{ loop.index0 ~ m.a }}{% if loop.last %}/{{ loop.length }}{% endif %}{% endfor %}",
            "011x/2",
        ),
        ("{% for m in ms if m.a == 7 %}{{ m.a }}{% else %}none{% endfor %}", "none"),
        ("{% for m in ms recursive %}{{ m.a }}{{ loop(m.k) if m.k }}{% endfor %}", "12x"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "13"),
        ("{% generation %}a{% endgeneration %}{{ {'a': '<é>'} | tojson }}", 'a{"a": "<é>"}'),
        ("{{ {'b': [1]} | tojson(indent=2) }}", '{\n  "b": [\n    1\n  ]\n}'),
        ("{% set s = namespace(n=0) %}{% for m in ms %}{% set s.n = s.n + 1 %}{% endfor %}{{ s.n }}", "2"),
        ("{{ ms | selectattr('k') | map(attribute='a') | join(',') }}", "1"),
        ("{% if x %}\n  a\n{% endif %}\nb", "b"),
        ("{{ none ~ 'a' ~ (1 ~ 2) }}{{ 'a-b'.split('-') | last }}{{ missing is defined }}", "Nonea12bFalse"),
        ("{{ 'é' * 3 }}{{ '%02d' % 7 }}{{ '{}!'.format('a') }}{{ 2 ** 8 }}", "ééé07a!256"),
    ],
)
def test_renders_what_templates_use(source, expected):
    assert run(source, ms=[{"a": 1, "k": [{"a": 2}]}, {"a": "x"}]) == expected


def test_strftime_now_gives_the_date():
    assert run("{{ strftime_now('%Y') }}").isdigit()


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10000000000 }}",
        "{{ 10000000000 * [1] }}",
        "{% set n = 10 ** 1000 %}{{ n ** 1000 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ 'a'.center(1000000000) }}",
        "{{ 'a\nb' | indent(1000000000) }}",
        "{{ [1] | tojson(indent=1000000000) }}",
        "{{ range(1000000000) | list | length }}",
        "{% set s = namespace(x='aa') %}{% for i in range(60) %}{% set s.x = s.x ~ s.x %}{% endfor %}",
        "{% set s = namespace(x='aa') %}{% for i in range(60) %}{% set s.x = s.x + s.x %}{% endfor %}",
        "{% set s = namespace(x='aa') %}{% for i in range(60) %}{% set s.x = [s.x, s.x] | join %}{% endfor %}",
        "{% set s = 'a' * 100000 %}{{ s.replace('a', s) }}",
        "{% set s = 'a' * 100000 %}{{ s | replace('a', s) }}",
        "{% set s = 'a' * 100000 %}{{ s.join(range(1000) | map('string') | list) }}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
    ],
)
def test_a_template_that_wants_too_much_memory_is_stopped(source):
    with pytest.raises(jinja2.TemplateError):
        run(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
        "{% set a = range(99999) | list %}{% for i in range(99999) %}{% if 'x' in a %}{% endif %}{% endfor %}",
        "{% set s = namespace(x=[1]) %}{% for i in range(60) %}{% set s.x = [s.x, s.x] %}{% endfor %}{{ s.x }}",
    ],
)
def test_a_template_that_runs_on_is_stopped(source, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(sandbox, "MAX_SIZE", 1_000_000)
    with pytest.raises(sandbox.LimitExceeded):
        run(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ items.append(1) }}",
        "{{ range.__globals__.x }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
    ],
)
def test_python_is_out_of_reach(source):
    with pytest.raises(SecurityError):
        run(source, items=[])


@pytest.mark.parametrize(
    "source", ["{{", "{% if", "{% nonsense %}", "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "x" * 300_000]
)
def test_what_is_no_template_is_refused(source):
    with pytest.raises(jinja2.TemplateError):
        sandbox.compile_template(source)


def test_limits_are_of_one_rendering_and_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.05)
    with pytest.raises(sandbox.LimitExceeded):
        run("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    assert run("{% for i in range(3) %}{{ i }}{% endfor %}") == "012"
