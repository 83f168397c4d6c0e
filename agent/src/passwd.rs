//! Home directories by an image's `/etc/passwd`. Nothing else of it: users come by number.
//!
//! Not glibc's functions, because a static glibc would load NSS modules out of the image.

/// The home directory of `uid`, `/` when the file has none: runc's rule for `HOME`.
pub fn home(passwd: &[u8], uid: u32) -> String {
    String::from_utf8_lossy(passwd)
        .lines()
        .find_map(|line| {
            let mut fields = line.split(':').skip(2);
            let matches = fields.next()?.parse() == Ok(uid);
            let home = fields.nth(2)?;
            (matches && !home.is_empty()).then(|| home.to_owned())
        })
        .unwrap_or_else(|| "/".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_is_found_by_number_and_defaults_to_the_root() {
        let passwd = b"root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:101:101::/srv/web:/bin/false\nnone:x:7:7:::\n";
        assert_eq!(home(passwd, 0), "/root");
        assert_eq!(home(passwd, 101), "/srv/web");
        assert_eq!(home(passwd, 7), "/");
        assert_eq!(home(passwd, 9), "/");
        assert_eq!(home(b"", 0), "/");
    }
}
