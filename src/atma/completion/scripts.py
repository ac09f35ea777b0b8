"""The table of what can be completed as a script of a shell.

All three read a command line alike: words that name a verb, then options, each of which takes nothing, one value or
all words up to the next option; what is left are the verb's own words, counted from the first.
"""

from collections.abc import Mapping

HEAD = "# Completion of atma {version}, made by `atma completion {shell}`; make it anew after an update.\n"

BASH = r"""
_atma_kind() {  # what can stand for a value of a kind; $1 is the kind with its choices
  local kind="${1%% *}" one
  case "$kind" in
    choice) COMPREPLY+=($(compgen -W "${1#choice}" -- "$cur")) ;;
    key)
      _atma_table "keys:"
      COMPREPLY+=($(compgen -S = -W "$REPLY" -- "$cur"))
      compopt -o nospace 2>/dev/null ;;
    model)
      _atma_table "models:"
      COMPREPLY+=($(compgen -W "$REPLY" -- "$cur"))
      for one in runs/*/final; do [[ -d "$one" && "${one%/final}" == "$cur"* ]] && COMPREPLY+=("${one%/final}"); done
      compopt -o filenames 2>/dev/null
      COMPREPLY+=($(compgen -d -- "$cur")) ;;
    recipe)
      _atma_table "recipes:"
      COMPREPLY+=($(compgen -W "$REPLY" -- "$cur"))
      compopt -o filenames 2>/dev/null
      COMPREPLY+=($(compgen -f -X '!*.toml' -- "$cur") $(compgen -d -- "$cur")) ;;
    path)
      compopt -o filenames 2>/dev/null
      COMPREPLY+=($(compgen -f -- "$cur")) ;;
  esac
}

_atma() {
  local IFS=$' \t\n' cur="${COMP_WORDS[COMP_CWORD]}" verb="" option="" takes="flag" kind="" word REPLY=""
  local -i i=1 place=0
  COMPREPLY=()
  while ((i < COMP_CWORD)); do
    _atma_table "verbs:$verb"
    [[ -n "$REPLY" ]] || break
    verb="${verb:+$verb }${COMP_WORDS[i]}"
    i+=1
  done
  _atma_table "verbs:$verb"
  if [[ -n "$REPLY" ]]; then
    COMPREPLY=($(compgen -W "$REPLY --help" -- "$cur"))
    return
  fi
  while ((i < COMP_CWORD)); do
    word="${COMP_WORDS[i]}"
    i+=1
    if [[ "$word" == "=" ]]; then
      continue
    elif [[ "$word" == -* ]]; then
      option="$word"
      _atma_table "option:$verb $option"
      takes="${REPLY%% *}" kind="${REPLY#* }"
      [[ -n "$takes" ]] || takes="flag"
    elif [[ "$takes" == value ]]; then
      takes="flag"
    elif [[ "$takes" == flag ]]; then
      place+=1
    fi
  done
  [[ "$cur" == "=" ]] && cur=""
  if [[ "$cur" == -* ]]; then
    _atma_table "options:$verb"
    COMPREPLY=($(compgen -W "$REPLY" -- "$cur"))
  elif [[ "$takes" != flag ]]; then
    _atma_kind "$kind"
  else
    _atma_table "place:$verb $place"
    [[ -n "$REPLY" ]] || _atma_table "place:$verb *"
    _atma_kind "$REPLY"
  fi
}

complete -F _atma atma
"""

ZSH = r"""
_atma_kind() {  # what can stand for a value of a kind; $1 is the kind with its choices
  local kind="${1%% *}"
  local -a runs
  case "$kind" in
    choice) compadd -- ${=1#choice} ;;
    key)
      _atma_table "keys:"
      compadd -S = -- ${=REPLY} ;;
    model)
      _atma_table "models:"
      compadd -- ${=REPLY}
      runs=(runs/*/final(N/:h))
      (( $#runs )) && compadd -- $runs
      _files -/ ;;
    recipe)
      _atma_table "recipes:"
      [[ -n "$REPLY" ]] && compadd -- ${=REPLY}
      _files -g '*.toml' ;;
    path) _files ;;
  esac
}

_atma() {
  local cur="${words[CURRENT]}" verb="" option="" takes="flag" kind="" word="" REPLY=""
  local -i i=2 place=0
  while (( i < CURRENT )); do
    _atma_table "verbs:$verb"
    [[ -n "$REPLY" ]] || break
    verb="${verb:+$verb }${words[i]}"
    (( i += 1 ))
  done
  _atma_table "verbs:$verb"
  if [[ -n "$REPLY" ]]; then
    compadd -- ${=REPLY} --help
    return
  fi
  while (( i < CURRENT )); do
    word="${words[i]}"
    (( i += 1 ))
    if [[ "$word" == -*=* ]]; then
      takes="flag"
    elif [[ "$word" == -* ]]; then
      option="$word"
      _atma_table "option:$verb $option"
      takes="${REPLY%% *}" kind="${REPLY#* }"
      [[ -n "$takes" ]] || takes="flag"
    elif [[ "$takes" == value ]]; then
      takes="flag"
    elif [[ "$takes" == flag ]]; then
      (( place += 1 ))
    fi
  done
  if [[ "$cur" == -* ]]; then
    _atma_table "options:$verb"
    compadd -- ${=REPLY}
  elif [[ "$takes" != flag ]]; then
    _atma_kind "$kind"
  else
    _atma_table "place:$verb $place"
    [[ -n "$REPLY" ]] || _atma_table "place:$verb *"
    _atma_kind "$REPLY"
  fi
}

if [[ "$funcstack[1]" == _atma ]]; then
  _atma "$@"
elif (( $+functions[compdef] )); then
  compdef _atma atma
fi
"""

FISH = r"""
function __atma_kind
  set -l parts (string split ' ' -- $argv[1])
  set -l cur (commandline -ct)
  switch $parts[1]
    case choice
      printf '%s\n' $parts[2..-1]
    case key
      for key in (string split ' ' -- (__atma_table keys:))
        echo $key=
      end
    case model
      string split ' ' -- (__atma_table models:)
      for final in runs/*/final
        string replace -r '/final$' '' -- $final
      end
      __fish_complete_directories $cur
    case recipe
      string split ' ' -- (__atma_table recipes:)
      __fish_complete_suffix .toml
    case path
      __fish_complete_path $cur
  end
end

function __atma_complete
  set -l tokens (commandline -opc)
  set -e tokens[1]
  set -l cur (commandline -ct)
  set -l verb ''
  while test (count $tokens) -gt 0; and test -n "$(__atma_table "verbs:$verb")"
    set verb (string trim -- "$verb $tokens[1]")
    set -e tokens[1]
  end
  set -l verbs (__atma_table "verbs:$verb")
  if test -n "$verbs"
    string split ' ' -- $verbs
    return
  end
  set -l takes flag
  set -l kind ''
  set -l place 0
  for word in $tokens
    if string match -q -- '-*=*' $word
      set takes flag
    else if string match -q -- '-*' $word
      set -l told (string split -m 1 ' ' -- (__atma_table "option:$verb $word"))
      set takes flag
      test -n "$told[1]"; and set takes $told[1]
      set kind $told[2]
    else if test $takes = value
      set takes flag
    else if test $takes = flag
      set place (math $place + 1)
    end
  end
  if string match -q -- '-*' $cur
    string split ' ' -- (__atma_table "options:$verb")
  else if test $takes != flag
    __atma_kind $kind
  else
    set -l told (__atma_table "place:$verb $place")
    test -n "$told"; or set told (__atma_table "place:$verb *")
    __atma_kind $told
  end
end

complete -c atma -f -a '(__atma_complete)'
"""


def script(shell: str, facts: Mapping[str, str], version: str) -> str:
    """The script of bash, zsh or fish."""
    head = HEAD.format(version=version, shell=shell)
    if shell == "fish":
        return head + _fish_table(facts) + FISH
    return ("#compdef atma\n" if shell == "zsh" else "") + head + _table(facts) + (BASH if shell == "bash" else ZSH)


def _table(facts: Mapping[str, str]) -> str:
    lines = [f'    "{key}") REPLY="{value}" ;;' for key, value in facts.items()]
    return "\n".join(["", "_atma_table() {", '  REPLY=""', '  case "$1" in', *lines, "  esac", "}", ""])


def _fish_table(facts: Mapping[str, str]) -> str:
    lines = [f"    case '{key.replace('*', chr(92) + '*')}'\n      echo '{value}'" for key, value in facts.items()]
    return "\n".join(["", "function __atma_table", "  switch $argv[1]", *lines, "  end", "end", ""])
