//! Text is only text: it is shown as written and runs nothing.

use e2e::{Browser, Front};
use serde_json::json;

use super::{
    messenger::{Messenger, assert_all_show},
    site::site,
};
use crate::support::Two;

/// As the server stores them: one line, trimmed.
fn texts() -> Vec<String> {
    let texts = [
        "<img src=x onerror=\"window.poisoned = 1; alert(1)\">",
        "<script>window.poisoned = 2</script>",
        "<svg onload=\"window.poisoned = 3\"></svg>",
        "%3Cimg%20src%3Dx%20onerror%3D%22window.poisoned%20%3D%204%22%3E",
        "%3Cscript%3Ewindow.poisoned%20%3D%205%3C%2Fscript%3E",
        "&lt;script&gt; &amp;lt; &#60;b&#62; &nbsp; &unknown;",
        "broken escapes: % %% %zz %E0%A4%A %u0041 \\u0041 \\x3c",
        "javascript:window.poisoned=6",
        "[link](javascript:window.poisoned=7) JaVaScRiPt:alert(8) data:text/html,<script>alert(9)</script>",
        "https://example.com/?a=\"onmouseover=\"window.poisoned=10 https://bank.example@evil.example/",
        "\u{202e}gnp.exe elif\u{202c} and \u{2067}mixed \u{2066}directions",
        "{{constructor.constructor('window.poisoned = 11')()}} ${window.poisoned = 12}",
        "zero\u{200b}width\u{feff}and\u{200d}joiners e\u{301}\u{316}\u{317}\u{318}\u{319}",
        "שלום مرحبا 你好 👨‍👩‍👧‍👦 🏳️‍🌈",
        "__proto__ constructor toString hasOwnProperty null undefined NaN",
    ];
    texts.into_iter().map(str::to_owned).chain(["😀".repeat(480), "W".repeat(480)]).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn poisoned_texts_are_shown_as_they_are_and_do_nothing() {
    let browser = Browser::launch().await;
    let site = site(Front::plain(), &[]).await;
    let (world, two) = (&site.world, Two::meet(&site.world, site.api()).await);
    let (johns, janes) =
        (browser.context("john", &site.origin).await, browser.context("jane", &site.origin).await);
    johns.sign_in(&two.john).await;
    janes.sign_in(&two.jane).await;
    let (john, jane) =
        (Messenger::at(&johns, two.conversation).await, Messenger::at(&janes, two.conversation).await);
    for text in texts() {
        john.say(&text).await;
        jane.shows_last(&text).await;
        let preview = jane.line(two.conversation).css(".preview").text().await;
        assert!(!preview.is_empty() && text.starts_with(&preview), "{text}: {preview}");
    }
    let watching = [(&two.john, &john), (&two.jane, &jane)];
    assert_all_show(world, two.conversation, &watching).await;

    let again = Messenger::at(&janes, two.conversation).await;
    assert_eq!(again.rows().await, jane.rows().await);
    for page in [&john, &jane, &again] {
        assert_eq!(page.evaluate("window.poisoned ?? null").await, json!(null));
        let made = "document.querySelectorAll('.content :not(a), .preview *').length";
        assert_eq!(page.evaluate(made).await, 0, "no element but links was made of a text");
        let links = "Array.from(document.querySelectorAll('.content a'), (link) => link.href)";
        for link in page.evaluate(links).await.as_array().unwrap() {
            let link = link.as_str().unwrap();
            assert!(link.starts_with("https://example.com/"), "{link}");
        }
        // 480 of the widest letter do not widen the page.
        let fits = "document.documentElement.scrollWidth <= innerWidth";
        assert_eq!(page.evaluate(fits).await, true);
    }
}
