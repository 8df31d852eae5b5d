# ruff: noqa: E501
"""Hostile chat templates: escapes that must not execute anything, bombs that must end early.

Run as a program, renders every bomb under limits of memory and processor time and prints one JSON object a line:
name, seconds, characters of output, the error. So a guard that fails kills that process, not the tests.
"""

import json
import sys
import time
from pathlib import Path

MARK = "HACKED-BY-TEMPLATE"
RUN = f"import sys; sys.modules['{MARK}'] = sys"

ESCAPES = {
    "class-walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class-walk-items": "{{ ''['__class__']['__mro__'][1]['__subclasses__']() }}",
    "class-walk-attr": "{{ ((''|attr('__class__'))|attr('__mro__'))[1]|attr('__subclasses__')() }}",
    "attr-by-map": "{{ [''] | map(attribute='__class__') | list }}",
    "attr-by-join": "{{ [[]] | join(attribute='__class__.__base__') }}",
    "attr-by-groupby": "{{ [''] | groupby('__class__') }}",
    "attr-by-sort": "{{ ['', 'a'] | sort(attribute='__class__.__name__') | first | attr('__class__') }}",
    "attr-by-sum": "{{ [''] | sum(attribute='__class__.__bases__', start=()) }}",
    "selectattr": "{{ [''] | selectattr('__class__.__init__.__globals__') | list }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(range) }}",
    "format-map": "{{ '{x.__class__.__mro__}'.format_map({'x': ''}) }}",
    "format-by-map": "{{ ['{0.__class__.__mro__}'] | map('format', '') | list }}",
    "format-reference": "{% set f = '{0.__class__.__mro__}'.format %}{{ f('') }}",
    "percent": "{{ '%(a)s' % {'a': ''.__class__} }}",
    "macro-globals": f"{{% macro m() %}}{{% endmacro %}}{{{{ m.__init__.__globals__['__builtins__']['exec']({RUN!r}) }}}}",
    "macro-func": "{% macro m() %}{% endmacro %}{{ m._func.__code__ }}{{ m._environment }}",
    "namespace-class": "{{ namespace.__init__.__globals__ }}{{ namespace().__class__ }}",
    "namespace-set": "{% set ns = namespace() %}{% set ns.__class__ = dict %}{{ ns }}",
    "namespace-init": "{% set ns = namespace({'__class__': dict}) %}{{ ns.__class__ }}",
    "cycler-globals": f"{{{{ cycler.__init__.__globals__.os.system('echo {MARK}') }}}}",
    "joiner-globals": f"{{{{ joiner.__init__.__globals__['os'].popen('echo {MARK}').read() }}}}",
    "lipsum-globals": f"{{{{ lipsum.__globals__['os'].popen('echo {MARK}').read() }}}}",
    "function-globals": "{{ raise_exception.__globals__ }}{{ strftime_now.__func__ }}{{ range.__call__ }}",
    "self-context": "{{ self._TemplateReference__context }}{{ self.__init__.__globals__ }}",
    "loop-context": "{% for x in [1] %}{{ loop._iterable.__class__ }}{{ loop.__init__.__globals__ }}{% endfor %}",
    "undefined-globals": "{{ nothing.__class__.__init__.__globals__ }}",
    "generator-frame": "{% set g = [1] | map('string') %}{{ g.gi_frame.f_globals }}",
    "caller": "{% macro m() %}{{ caller.__init__.__globals__ }}{% endmacro %}{% call m() %}x{% endcall %}",
    "block-reference": "{% block a %}{% endblock %}{{ self.a.__init__.__globals__ }}{{ self.a._stack }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('echo') }}",
    "from-import": "{% from 'os' import system %}{{ system('echo') }}",
    "extends": "{% extends '/etc/passwd' %}",
    "call-a-class": "{{ dict.__class__('a', (), {}) }}",
    "changes-the-messages": "{{ messages.append(1) }}{{ messages[0].update({'role': 'x'}) }}{{ messages[0].pop('role') }}",
    "encode": "{{ 'a'.encode().__class__ }}{{ ''.maketrans.__self__ }}",
    "code-in-a-name": "{% set x = 1 if true else __import__('os').system('echo') %}{{ x }}{{ __import__('os') }}",
    "code-in-text": "{{ '\\'); import os; os.system(\"echo\") #' }}",
    "pass-argument": "{% set f = 'a'.upper %}{{ f.jinja_pass_arg }}{{ f._run }}{{ f._run.__globals__ }}",
    "filter-object": "{{ 'x' | attr('upper') | attr('__self__') | attr('__class__') }}",
}

BOMBS = {
    "times": "{{ 'a' * 200000000 }}",
    "power": "{{ 2 ** 4000000 }}",
    "power-chain": "{{ 9 ** 9 ** 9 ** 9 }}",
    "nested-loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "nested-loops-output": "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
    "huge-range": "{% for a in range(10 ** 12) %}x{% endfor %}",
    "range-list": "{{ range(99999999) | list | length }}",
    "macro-recursion": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "macro-tree": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "loop-recursion": "{% for x in [[]] recursive %}{{ loop([[]]) }}{% endfor %}",
    "loop-recursion-wide": "{% set a = range(500) %}{% for x in a recursive %}{{ loop(a) }}{% endfor %}",
    "join": "{{ range(99999) | join('a' * 99999) }}",
    "join-method": "{{ ('a' * 99999).join(['b'] * 99999) }}",
    "format-width": "{{ '%200000000d' % 1 }}",
    "format-star": "{{ '%*d' % (200000000, 1) }}",
    "format-many": "{{ ('%9999d' * 9999) % ((1,) * 9999) }}",
    "format-mapping": "{{ ('%(a)s' * 99999) % {'a': 'x' * 99999} }}",
    "format-parentheses": "{{ '%(a(b))200000000d' % {'a(b)': 1} }}",
    "format-method": "{{ '{:>200000000}'.format(1) }}",
    "format-nested": "{{ '{0:{1}}'.format(1, 200000000) }}",
    "format-repeat": "{{ ('{0}' * 9999).format('x' * 99999) }}",
    "format-filter": "{{ '%200000000s' | format('a') }}",
    "replace": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "replace-method": "{{ ('a' * 99999).replace('', 'b' * 99999) }}",
    "center": "{{ 'a' | center(200000000) }}",
    "ljust": "{{ 'a'.ljust(200000000) }}",
    "zfill": "{{ 'a'.zfill(200000000) }}",
    "expandtabs": "{{ ('\\t' * 9999).expandtabs(99999) }}",
    "indent": "{{ ('a\\n' * 9999) | indent(99999) }}",
    "batch-fill": "{{ [1] | batch(200000000, 0) | list | length }}",
    "slice-many": "{{ [1] | slice(200000000) | list | length }}",
    "round-places": "{{ 5 | round(-200000000) }}",
    "round-ceil": "{{ 5 | round(200000000, 'ceil') }}",
    "tojson-indent": "{{ {'a': [1] * 999} | tojson(indent=200000) }}",
    "tojson-deep": "{% set ns = namespace(a=[]) %}{% for i in range(9999) %}{% set ns.a = [ns.a] %}{% endfor %}{{ ns.a | tojson(indent=9) }}",
    "tojson-shared": "{% set ns = namespace(a=[1]) %}{% for i in range(99) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a | tojson }}",
    "str-shared": "{% set ns = namespace(a=[1]) %}{% for i in range(99) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}",
    "string-filter-shared": "{% set ns = namespace(a=(1,)) %}{% for i in range(99) %}{% set ns.a = (ns.a, ns.a) %}{% endfor %}{{ ns.a | string | length }}",
    "concat-shared": "{% set ns = namespace(a=(1,)) %}{% for i in range(99) %}{% set ns.a = (ns.a, ns.a) %}{% endfor %}{{ ns.a ~ '' }}",
    "equal-shared": "{% set n = namespace(a=(1,), b=(1,)) %}{% for i in range(99) %}{% set n.a = (n.a, n.a) %}{% set n.b = (n.b, n.b) %}{% endfor %}{{ n.a == n.b }}",
    "hash-shared": "{% set ns = namespace(a=(1,)) %}{% for i in range(99) %}{% set ns.a = (ns.a, ns.a) %}{% endfor %}{{ {ns.a: 1} }}",
    "index-shared": "{% set ns = namespace(a=(1,)) %}{% for i in range(99) %}{% set ns.a = (ns.a, ns.a) %}{% endfor %}{{ messages[0][ns.a] }}",
    "unique-shared": "{% set ns = namespace(a=(1,)) %}{% for i in range(99) %}{% set ns.a = (ns.a, ns.a) %}{% endfor %}{{ [ns.a] | unique | list }}",
    "test-shared": "{% set n = namespace(a=(1,), b=(1,)) %}{% for i in range(99) %}{% set n.a = (n.a, n.a) %}{% set n.b = (n.b, n.b) %}{% endfor %}{{ n.a is eq(n.b) }}",
    "exception-shared": "{% set ns = namespace(a=(1,)) %}{% for i in range(99) %}{% set ns.a = (ns.a, ns.a) %}{% endfor %}{{ raise_exception(ns.a) }}",
    "list-count-shared": "{% set n = namespace(a=(1,), b=(1,)) %}{% for i in range(99) %}{% set n.a = (n.a, n.a) %}{% set n.b = (n.b, n.b) %}{% endfor %}{{ [n.a].count(n.b) }}",
    "namespace-in-itself": "{% set ns = namespace() %}{% set ns.a = [ns, ns] %}{{ ns }}{{ ns.a }}{{ ns.a == [ns] }}",
    "doubling-text": "{% set ns = namespace(a='aaaaaaaa') %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a }}",
    "doubling-tilde": "{% set ns = namespace(a='aaaaaaaa') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}",
    "doubling-list": "{% set ns = namespace(a=[1]) %}{% for i in range(99) %}{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a | length }}",
    "doubling-number": "{% set ns = namespace(a=9) %}{% for i in range(99) %}{% set ns.a = ns.a * ns.a %}{% endfor %}{{ ns.a }}",
    "doubling-set-block": "{% set a %}aaaaaaaa{% endset %}" + "{% set a %}{{ a }}{{ a }}{{ a }}{{ a }}{% endset %}" * 30 + "{{ a | length }}",
    "keeping-texts": "{% set ns = namespace(a=[]) %}{% for i in range(9999) %}{% set ns.a = ns.a + ['a' * 900000 ~ i] %}{% endfor %}",
    "keeping-wide-texts": "{% set ns = namespace(a=[]) %}{% for i in range(9999) %}{% set ns.a = ns.a + ['\U0001f600' * 900000 ~ i] %}{% endfor %}",
    "keeping-splits": "{% set ns = namespace(a=[]) %}{% for i in range(9999) %}{% set ns.a = ns.a + [('a ' * 400000).split()] %}{% endfor %}",
    "search-back": "{{ ('a' * 900000).rfind('ab' + 'a' * 400000) }}",
    "search": "{{ ('a' * 900000).find('a' * 300000 + 'b' + 'a' * 100000) }}",
    "contains": "{{ ('a' * 300000 ~ 'b' ~ 'a' * 100000) in 'a' * 900000 }}",
    "rsplit": "{{ ('a' * 900000).rsplit('ab' + 'a' * 400000) | length }}",
    "strip": "{{ ('a' * 900000).strip('b' * 900000 ~ 'a') }}",
    "trim": "{{ ('a' * 900000) | trim('b' * 900000 ~ 'a') }}",
    "lists-of-literals": "{% set ns = namespace(a=[]) %}{% for i in range(99999) %}{% set ns.a = [ns.a, [" + "0," * 5000 + "]] %}{% endfor %}",
    "sum-of-lists": "{{ ([[1] * 999] * 999) | sum(start=[]) | length }}",
    "sort": "{% for i in range(9999) %}{{ range(99999) | list | sort | length }}{% endfor %}",
    "escape": "{{ ('<' * 900000) | escape | length }}{{ (('<' | e) * 99999) | replace('<', '<' * 9999) }}",
    "markup-join": "{{ ('<' | safe).join(['<' * 900000] * 99) | length }}",
    "urlencode": "{{ ('\U0001f600' * 900000) | urlencode | urlencode | length }}",
    "integer-text": "{{ ('9' * 900000) | int }}",
    "hex-literal": "{{ 0x" + "f" * 60000 + " }}",
    "digits-literal": "{{ " + "9" * 60000 + " }}",
    "strftime": "{{ strftime_now('%200000000Y' * 9) }}",
    "strftime-long": "{{ strftime_now('%c' * 900000) }}",
    "dict-of-ranges": "{{ dict([[1, range(99999)]] * 99999) }}",
    "in-range": "{% for i in range(99999) %}{{ 'a' in range(99999) }}{% endfor %}",
    "lipsum": "{{ lipsum(200000000) }}",
    "cycler": "{% set c = cycler(*range(99999)) %}{% for i in range(99999) %}{{ c.next() ~ c.next }}{% endfor %}",
    "varargs": "{% macro m() %}{{ varargs | length }}{% endmacro %}{% for i in range(99999) %}{{ m(*range(99999)) }}{% endfor %}",
    "select-nothing": "{% for i in range(99999) %}{{ range(99999) | select('none') | list }}{% endfor %}",
    "map-chain": "{{ range(99999)" + " | map('string')" * 500 + " | list | length }}",
    "constant-folding": "{{ 'a' | center(99999999) | length }}{{ ['a'] | batch(99999999, 'b') | list }}",
    "deep-parentheses": "{{ " + "(" * 30000 + "1" + ")" * 30000 + " }}",
    "deep-lists": "{{ " + "[" * 30000 + "]" * 30000 + " }}",
    "long-not": "{{ " + "not " * 15000 + "1 }}",
    "long-sum": "{{ " + "1+" * 30000 + "1 }}",
    "long-dots": "{{ a" + ".a" * 30000 + " }}",
    "long-filters": "{{ a" + "|e" * 30000 + " }}",
    "many-outputs": "{{a}}" * 4900,
    "many-sets": "".join(f"{{% set a{i} = 1 %}}" for i in range(2400)),
    "many-names": "{{ " + "+".join(f"n{i}" for i in range(7000)) + " }}",
    "many-branches": "".join(f"{{% if a %}}{{% set a{i} = 1 %}}{{% endif %}}" for i in range(850)),
    "many-loops": "".join(f"{{% for a{i} in b %}}{{{{ a{i} }}}}{{% endfor %}}" for i in range(1000)),
    "loops-in-loops": "{% for a in b %}{% for c in a %}{{ loop.index }}{{ c }}{% endfor %}{% endfor %}" * 500,
    "many-tildes": "{{ a" + " ~ a" * 7000 + " }}",
    "many-filters": "{{ a | upper | replace('a', 'b') }}" * 1100,
    "many-ifs": "{% if a %}" * 18 + "x" + "{% endif %}" * 18,
    "deep-ifs": "{% if a %}" * 3000 + "x" + "{% endif %}" * 3000,
    "long-elif": "{% if a %}" + "{% elif a %}" * 3600 + "{% endif %}",
    "deep-loops": "{% for a in b %}" * 1500 + "{% endfor %}" * 1500,
    "many-macros": "".join(f"{{% macro m{i}() %}}{{% endmacro %}}" for i in range(1600)),
    "unclosed-raw": "{% raw %}" + "{% " * 20000,
    "unclosed-comments": "{#" * 30000,
    "spaces": "{%" + " " * 60000 + "%}",
    "too-long": "x" * 100000,
}  # fmt: skip


def _peak_mb() -> int:
    """Of this process since it began; 0 where the system does not say (`ru_maxrss` begins with the parent's)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def main() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    from edgellama.chat_template import ChatTemplate
    from edgellama.errors import ChatTemplateError

    for name in sys.argv[1:] or BOMBS:
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 20, -1))
        started = time.process_time()
        text, error = "", None
        try:
            text = ChatTemplate(BOMBS[name]).render([{"role": "user", "content": "Hi"}])
        except ChatTemplateError as problem:
            error = str(problem)
        seconds = time.process_time() - started
        peak = _peak_mb()
        print(
            json.dumps({"name": name, "seconds": seconds, "length": len(text), "error": error, "mb": peak}), flush=True
        )


if __name__ == "__main__":
    main()
