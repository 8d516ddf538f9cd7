//! The text of a manual page (man or mdoc macros): requests that lay out are dropped, those that carry
//! words keep them.

/// Macros whose arguments are words of the text.
const WORDS: [&str; 22] = [
    "B", "I", "BR", "RB", "IR", "RI", "BI", "IB", "SM", "SB", "TP", "Nm", "Fl", "Ar", "Op", "Xr",
    "Pa", "Dq", "Em", "Li", "Nd", "It",
];
/// Macros that set their arguments in turn in two fonts, without space between them.
const JOINED: [&str; 6] = ["BR", "RB", "IR", "RI", "BI", "IB"];

/// The page's text, with sections as headings and filled paragraphs on one line.
pub(super) fn text(page: &str) -> String {
    let mut out = String::new();
    let mut filled = true;
    for line in page.lines() {
        let Some(request) = line.strip_prefix(['.', '\'']) else {
            match line.is_empty() {
                true => out.push_str("\n\n"),
                false => push(&mut out, &plain(line), filled),
            }
            continue;
        };
        let request = request.trim_start();
        let (name, rest) = request.split_once(char::is_whitespace).unwrap_or((request, ""));
        let words = plain(&arguments(rest).join(if JOINED.contains(&name) { "" } else { " " }));
        match name {
            "SH" | "Sh" => push(&mut out, &format!("\n\n# {words}\n\n"), false),
            "SS" | "Ss" => push(&mut out, &format!("\n\n## {words}\n\n"), false),
            "PP" | "P" | "LP" | "Pp" | "sp" | "IP" | "TP" | "It" => out.push_str("\n\n"),
            "br" => out.push('\n'),
            "nf" | "EX" | "Bd" | "fi" | "EE" | "Ed" => {
                filled = matches!(name, "fi" | "EE" | "Ed");
                out.push_str("\n\n");
            }
            _ => {}
        }
        if WORDS.contains(&name) && !words.is_empty() {
            push(&mut out, &words, filled);
        }
    }
    out
}

/// Adds one line: a filled one goes on where the one before it ended.
fn push(out: &mut String, line: &str, filled: bool) {
    if !filled {
        out.push_str(line);
        out.push('\n');
        return;
    }
    if !out.is_empty() && !out.ends_with([' ', '\n']) {
        out.push(' ');
    }
    out.push_str(line.trim());
}

/// A request's arguments: words, or strings in double quotes.
fn arguments(rest: &str) -> Vec<&str> {
    let mut arguments = Vec::new();
    let mut rest = rest.trim();
    while !rest.is_empty() {
        let (argument, after) = match rest.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => rest.split_once(' ').unwrap_or((rest, "")),
        };
        arguments.push(argument);
        rest = after.trim_start();
    }
    arguments
}

/// A line without its escapes.
fn plain(line: &str) -> String {
    let mut out = String::new();
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('"' | '#') | None => break,
            Some('-') => out.push('-'),
            Some('e' | '\\') => out.push('\\'),
            Some(' ' | '~' | '0') => out.push(' '),
            Some('f' | '*' | 'n' | 's') => skip_name(&mut chars),
            Some('(') => out.push_str(glyph(&chars.by_ref().take(2).collect::<String>())),
            Some('[') => {
                out.push_str(glyph(&chars.by_ref().take_while(|&c| c != ']').collect::<String>()));
            }
            Some('&' | '|' | '^' | '%' | 'c' | '/' | ',' | ')' | ':') => {}
            Some(other) => out.push(other),
        }
    }
    out
}

/// Passes over the name of a font, string or register: one character, `(xx` or `[name]`.
fn skip_name(chars: &mut std::str::Chars) {
    match chars.next() {
        Some('(') => {
            chars.nth(1);
        }
        Some('[') => {
            chars.find(|&c| c == ']');
        }
        Some('+' | '-') => {
            chars.next();
        }
        _ => {}
    }
}

fn glyph(name: &str) -> &'static str {
    match name {
        "aq" | "cq" | "oq" => "'",
        "dq" | "lq" | "rq" => "\"",
        "em" | "en" | "hy" | "mi" => "-",
        "bu" => "-",
        "rs" => "\\",
        "ga" => "`",
        "ti" => "~",
        "ha" => "^",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_becomes_text() {
        let page = ".\\\" comment\n.TH CAT 1 \"date\"\n.SH NAME\ncat \\- concatenate \\fBfiles\\fR\n.PP\n\
            .B \"\\-n\"\nnumber \\(bu lines\\&, see\n.BR wc (1)\n.nf\nexample \\e\n  two\n.fi\nend\n";
        let text = text(page);
        let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
        assert_eq!(
            lines,
            [
                "# NAME",
                "cat - concatenate files",
                "-n number - lines, see wc(1)",
                "example \\",
                "  two",
                "end"
            ]
        );
    }

    #[test]
    fn broken_pages_do_not_fail() {
        for page in ["\\", ".", "'", "\\f", "\\f(", "\\[", "\\(a", ".SH", "\\s+", ".B \"", ".BR"] {
            text(page);
        }
    }
}
