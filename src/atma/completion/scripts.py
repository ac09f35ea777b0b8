"""The table of what can be completed as a script of a shell.

All three read a command line alike: words that name a verb, then options, each of which takes nothing, one value or
all words up to the next option; what is left are the verb's own words, counted from the first.
"""

from collections.abc import Mapping

HEAD = "# Completion of atma {version}, made by `atma completion {shell}`; make it anew after an update.\n"

BASH = r"""
_atma_words() {  # those of the words of $1 that begin with what is typed, with $2 behind
  local one
  local -a all
  read -r -a all <<< "$1"
  for one in "${all[@]}"; do [[ "$one" == "$cur"* ]] && COMPREPLY+=("$one$2"); done
}

_atma_files() {  # files and folders, one a line, whatever is in their names
  local one
  compopt -o filenames 2>/dev/null
  while IFS= read -r one; do
    type compopt >/dev/null 2>&1 || printf -v one %q "$one"  # bash 3 does not quote them itself
    COMPREPLY+=("$one")
  done
}

_atma_runs() {  # run folders of runs/ that have a model
  local one typed="${cur//\\/}"
  typed="${typed#[\"\']}"
  for one in runs/*/final; do [[ -d "$one" && "${one%/final}" == "$typed"* ]] && printf '%s\n' "${one%/final}"; done
}

_atma_kind() {  # what can stand for a value of a kind; $1 is the kind with its choices
  local kind="${1%% *}"
  case "$kind" in
    choice) _atma_words "${1#choice}" ;;
    key)
      _atma_table "keys:"
      _atma_words "$REPLY" =
      compopt -o nospace 2>/dev/null ;;
    model)
      _atma_table "models:"
      _atma_words "$REPLY"
      _atma_files < <(_atma_runs; compgen -d -- "$cur") ;;
    recipe)
      _atma_table "recipes:"
      _atma_words "$REPLY"
      _atma_files < <(compgen -f -X '!*.toml' -- "$cur"; compgen -d -- "$cur") ;;
    path) _atma_files < <(compgen -f -- "$cur") ;;
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
    _atma_words "$REPLY --help"
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
    _atma_words "$REPLY"
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
    lines = [f"    {_quoted(key)}) REPLY={_quoted(value)} ;;" for key, value in facts.items()]
    return "\n".join(["", "_atma_table() {", '  REPLY=""', '  case "$1" in', *lines, "  esac", "}", ""])


def _fish_table(facts: Mapping[str, str]) -> str:
    lines = [f"    case {_fish_quoted(_literal(key))}\n      echo {_fish_quoted(text)}" for key, text in facts.items()]
    return "\n".join(["", "function __atma_table", "  switch $argv[1]", *lines, "  end", "end", ""])


def _quoted(text: str) -> str:
    """A text as bash and zsh read it."""
    return "'" + text.replace("'", "'\"'\"'") + "'"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _literal(text: str) -> str:
    """A pattern of fish that is this text alone."""
    return text.replace("*", "\\*").replace("?", "\\?")
