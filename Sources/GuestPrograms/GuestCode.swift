/// The machine code of the guests, made from `Guests/*.s`.
enum GuestCode {
    /// The flat image, from ``GuestLayout/entry`` on.
    static let bytes = bytes(of: hexadecimal)

    static func bytes(of hexadecimal: String) -> [UInt8] {
        let digits = hexadecimal.utf8.map { $0 < 0x3A ? $0 - 0x30 : $0 - 0x57 }
        return stride(from: 0, to: digits.count, by: 2).map { digits[$0] << 4 | digits[$0 + 1] }
    }
}

/// The machine code of ``SpinGuest``, made from `Guests/spin.s`.
enum SpinCode {
    static let bytes = GuestCode.bytes(of: hexadecimal)
}
