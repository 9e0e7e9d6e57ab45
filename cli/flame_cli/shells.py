"""What shells have to read to complete the programs of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from flame_cli.choices import Shell
from flame_cli.completion import COMPLETE


def script(shell: Shell, programs: Sequence[str]) -> str:
    """Return what a shell has to read to complete these programs."""
    text = _SCRIPTS[shell].replace("@COMPLETE@", COMPLETE).replace("@PROGRAMS@", " ".join(programs))
    return text.strip()


_BASH: Final = r"""
# Completion of flmctl for bash. In ~/.bashrc: source <(flmctl completion bash)
_flmctl_complete() {
    local line
    COMPREPLY=()
    while IFS= read -r line; do
        COMPREPLY+=("${line%%$'\t'*}")
    done < <("${COMP_WORDS[0]}" @COMPLETE@ "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -o default -F _flmctl_complete @PROGRAMS@
"""

_ZSH: Final = r"""
#compdef @PROGRAMS@
# Completion of flmctl for zsh. In ~/.zshrc, after compinit: source <(flmctl completion zsh)
_flmctl_complete() {
    local line
    local -a found
    while IFS= read -r line; do
        found+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}")
    done < <("${words[1]}" @COMPLETE@ "${(@)words[2,CURRENT]}" 2>/dev/null)
    if (( ${#found} )); then
        _describe -V candidates found
    else
        _files
    fi
}
if [[ "${funcstack[1]}" == _flmctl ]]; then
    _flmctl_complete "$@"
else
    compdef _flmctl_complete @PROGRAMS@
fi
"""

_FISH: Final = r"""
# Completion of flmctl for fish. In ~/.config/fish/config.fish: flmctl completion fish | source
function __flmctl_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l found ($words[1] @COMPLETE@ $words[2..-1] "$current" 2>/dev/null)
    if test (count $found) -gt 0
        printf '%s\n' $found
    else
        __fish_complete_path "$current"
    end
end
for program in @PROGRAMS@
    complete --command $program --no-files --arguments '(__flmctl_complete)'
end
"""

_SCRIPTS: Final = {Shell.BASH: _BASH, Shell.ZSH: _ZSH, Shell.FISH: _FISH}
