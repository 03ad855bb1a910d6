//! Requests and limits: readable, both there where they must be, and in order.

use crate::{
    Installation,
    set::{Pod, at, entries},
};

/// In thousandths, so that `250m` is a whole number.
fn quantity(text: &str) -> Option<u128> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let thousandths = format!("{fraction:0<3}");
    let number = whole.parse::<u128>().ok()? * 1_000 + thousandths.get(..3)?.parse::<u128>().ok()?;
    let factor: u128 = match unit {
        "" => 1,
        "m" => return Some(number / 1_000),
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return None,
    };
    Some(number * factor)
}

pub fn quantities_make_sense(installation: &Installation) -> Vec<String> {
    let mut findings = Vec::new();
    for container in installation.set.pods().into_iter().flat_map(Pod::containers) {
        let id = container.id();
        let resources = &container.body["resources"];
        let read = |part: &str, name: &str| {
            let value = at(resources, &format!("{part}/{name}"));
            value.as_str().map(str::to_owned).or_else(|| value.as_number().map(ToString::to_string))
        };
        for part in ["requests", "limits"] {
            for (name, _) in entries(&resources[part]) {
                let value = read(part, name).unwrap_or_default();
                if quantity(&value).is_none() {
                    findings.push(format!("{id}: {value:?} is no quantity ({part} of {name})"));
                }
            }
        }
        for (part, name) in [("requests", "cpu"), ("requests", "memory"), ("limits", "memory")] {
            if read(part, name).is_none() {
                findings.push(format!("{id}: {part} of {name} are missing"));
            }
        }
        for (name, _) in entries(&resources["limits"]) {
            let of = |part| read(part, name).and_then(|value| quantity(&value));
            if let (Some(request), Some(limit)) = (of("requests"), of("limits"))
                && limit < request
            {
                findings.push(format!("{id}: its limit of {name} is below its request"));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::quantity;

    #[test]
    fn quantities_are_compared_whatever_their_unit() {
        for (text, thousandths) in [
            ("250m", 250),
            ("1", 1_000),
            ("0.5", 500),
            ("1.25", 1_250),
            ("1Ki", 1_024_000),
            ("2k", 2_000_000),
        ] {
            assert_eq!(quantity(text), Some(thousandths), "{text}");
        }
        for text in ["", "128MB", "1 Gi", "half", "-1", "1e"] {
            assert_eq!(quantity(text), None, "{text}");
        }
    }
}
