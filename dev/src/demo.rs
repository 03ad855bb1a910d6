//! Lines that `cargo dev up` prints to paste: john writes to jane, and she sees it, by bash and curl alone.

/// Jane listens twice, and the ingress sends each stream to another gateway.
pub(crate) fn demo(base: &str) -> String {
    format!(
        r#"(base={base}
login() {{ curl -sS "$base/api/login" -H 'Content-Type: application/json' -d "{{\"username\":\"$1\"}}" | grep -o '"token":"[^"]*' | cut -d'"' -f4; }}
john=$(login john) jane=$(login jane)
for gateway in 1 2; do
  curl -sSN "$base/api/messages" -H 'Accept: text/event-stream' -H "Authorization: Bearer $jane" > >(sed -u "s/^/jane $gateway | /") &
  streams+=" $!"
done; sleep 1
conversation=$(curl -sSL "$base/api/conversations" -H 'Content-Type: application/json' -H "Authorization: Bearer $john" -d '{{"username":"jane"}}' | grep -o '"id":"[^"]*' | head -n 1 | cut -d'"' -f4)
curl -sS "$base/api/conversations/$conversation/messages" -H 'Content-Type: application/json' -H "Authorization: Bearer $john" -d '{{"content":"hello jane"}}'; echo
sleep 1; kill $streams)
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn the_demo_is_bash_that_needs_only_curl() {
        let text = demo("http://localhost:3000");
        assert!(text.starts_with("(base=http://localhost:3000\n"));
        let checked = Command::new("bash").args(["-n", "-c", &text]).output().unwrap();
        assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
        assert!(!text.contains("jq") && !text.contains("python"));
    }
}
