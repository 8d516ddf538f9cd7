//! The text of an HTML page, as Markdown-like plain text. It is made for the documentation that rustdoc,
//! mdBook and asciidoc write, and never fails: what it does not know, it leaves out.

/// Elements whose content is not read.
const SKIPPED: [&str; 7] = ["head", "script", "style", "nav", "button", "svg", "noscript"];
/// Elements that end a paragraph.
const BLOCKS: [&str; 17] = [
    "p",
    "div",
    "section",
    "article",
    "main",
    "ul",
    "ol",
    "dl",
    "dd",
    "dt",
    "table",
    "blockquote",
    "header",
    "footer",
    "br",
    "body",
    "tr",
];

/// The page's text.
pub(super) fn text(page: &str) -> String {
    let mut out = String::new();
    let mut rest = page;
    let mut preformatted = false;
    while let Some((before, after)) = rest.split_once('<') {
        push(&mut out, before, preformatted);
        if let Some(comment) = after.strip_prefix("!--") {
            rest = comment.split_once("-->").map_or("", |(_, after)| after);
            continue;
        }
        let Some((tag, after)) = after.split_once('>') else {
            rest = "";
            break;
        };
        rest = after;
        let closing = tag.starts_with('/');
        let name: String = tag
            .trim_start_matches('/')
            .chars()
            .take_while(char::is_ascii_alphanumeric)
            .collect::<String>()
            .to_ascii_lowercase();
        match name.as_str() {
            name if SKIPPED.contains(&name) && !closing && !tag.ends_with('/') => {
                rest = after_element(rest, name);
            }
            "pre" => {
                preformatted = !closing;
                out.push_str(if closing { "\n```\n\n" } else { "\n\n```\n" });
            }
            "h1" | "h2" | "h3" | "h4" | "h5" | "h6" if closing => out.push_str("\n\n"),
            "h1" | "h2" | "h3" | "h4" | "h5" | "h6" => {
                out.push_str("\n\n");
                out.push_str(&"#".repeat(usize::from(name.as_bytes()[1] - b'0')));
                out.push(' ');
            }
            "li" if !closing => out.push_str("\n- "),
            "code" if !preformatted => out.push('`'),
            name if BLOCKS.contains(&name) => out.push_str("\n\n"),
            _ => {}
        }
    }
    push(&mut out, rest, preformatted);
    out
}

/// What follows the closing tag of element `name`.
fn after_element<'a>(text: &'a str, name: &str) -> &'a str {
    let mut rest = text;
    while let Some((_, after)) = rest.split_once("</") {
        let matches = after.get(..name.len()).is_some_and(|tag| tag.eq_ignore_ascii_case(name));
        if matches {
            return after.split_once('>').map_or("", |(_, after)| after);
        }
        rest = after;
    }
    ""
}

/// Adds text with its character references resolved, and outside of `<pre>` with single spaces.
fn push(out: &mut String, text: &str, preformatted: bool) {
    for c in unescape(text).chars() {
        if preformatted || !c.is_whitespace() {
            out.push(c);
        } else if !out.ends_with([' ', '\n']) {
            out.push(' ');
        }
    }
}

fn unescape(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('&') {
        out.push_str(before);
        let reference = after.split_once(';').filter(|(name, _)| name.len() <= 8);
        match reference.and_then(|(name, after)| Some((character(name)?, after))) {
            Some((c, after)) => {
                out.push(c);
                rest = after;
            }
            None => {
                out.push('&');
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out
}

fn character(name: &str) -> Option<char> {
    Some(match name {
        "lt" => '<',
        "gt" => '>',
        "amp" => '&',
        "quot" => '"',
        "apos" | "lsquo" | "rsquo" => '\'',
        "nbsp" => ' ',
        "mdash" | "ndash" => '-',
        _ => {
            let number = name.strip_prefix('#')?;
            let code = match number.strip_prefix(['x', 'X']) {
                Some(hex) => u32::from_str_radix(hex, 16).ok()?,
                None => number.parse().ok()?,
            };
            char::from_u32(code).filter(|c| !c.is_control())?
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_becomes_text() {
        let page = "<html><head><title>T</title></head><body><nav><a>menu</a></nav><h2 id=x>Title</h2>\
            <p>Some  <code>code</code>\nand &lt;this&gt; &#x41;&#66; &amp; more &unknown;.</p>\
            <!-- <p>gone</p> --><pre><code>a &lt; b\n  c</code></pre><script>var x = '<p>';</script></body></html>";
        let text = text(page);
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        assert_eq!(
            lines,
            [
                "## Title",
                "Some `code` and <this> AB & more &unknown;.",
                "```",
                "a < b",
                "  c",
                "```"
            ]
        );
    }

    #[test]
    fn broken_pages_do_not_fail() {
        for page in ["<", "a<b", "<script>never closed", "</", "&#xffffffff;&#0;&;", "<!--", "<é>"]
        {
            text(page);
        }
        assert_eq!(text("plain & simple"), "plain & simple");
    }
}
